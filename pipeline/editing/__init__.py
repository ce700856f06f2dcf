"""The editors by name. A new one is its file, its line here, its test and its page in docs/methods."""

from __future__ import annotations

from pipeline.editing.base import EditingMethod
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.concepts import Concepts
from pipeline.editing.consistory import ConsiStory
from pipeline.editing.diffedit import DiffEdit
from pipeline.editing.direct_edit import DirectEdit
from pipeline.editing.endpoint import Endpoint
from pipeline.editing.fast_diffedit import FastDiffEdit
from pipeline.editing.flow_edit import FlowEdit
from pipeline.editing.h_edit import HEdit
from pipeline.editing.instruct import Instruct
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.editing.masactrl import MasaCtrl
from pipeline.editing.plug_and_play import PlugAndPlay
from pipeline.editing.prompt_to_prompt import PromptToPrompt
from pipeline.editing.prox_masactrl import ProxMasaCtrl
from pipeline.editing.proxedit import ProxEdit
from pipeline.editing.reconstruct import Reconstruct
from pipeline.editing.riemannian import Riemannian
from pipeline.editing.uniedit_flow import UniEditFlow

EDITORS: dict[str, type[EditingMethod]] = {
    "cfg": ClassifierFreeGuidance,
    "concepts": Concepts,
    "consistory": ConsiStory,
    "diffedit": DiffEdit,
    "direct_edit": DirectEdit,
    "endpoint": Endpoint,
    "fast_diffedit": FastDiffEdit,
    "flow_edit": FlowEdit,
    "h_edit": HEdit,
    "instruct": Instruct,
    "ledits_pp": LEditsPP,
    "masactrl": MasaCtrl,
    "plug_and_play": PlugAndPlay,
    "prompt_to_prompt": PromptToPrompt,
    "prox_masactrl": ProxMasaCtrl,
    "proxedit": ProxEdit,
    "reconstruct": Reconstruct,
    "riemannian": Riemannian,
    "uniedit_flow": UniEditFlow,
}
