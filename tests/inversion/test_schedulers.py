"""Scheduler configurations as checkpoints ship them: the levels that diffusers' pipelines walk, and exact inversion."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, StableDiffusionPipeline

from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.editing.reconstruct import Reconstruct
from pipeline.engine.engine import Engine
from pipeline.errors import ModelError
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.records import EditRequest
from tests.methods import analytic, invert_and_edit, source

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd_1": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **BETAS, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
        "clip_sample": False,
    },
    "pndm_of_the_first_days": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.2.4", **BETAS},
    "sd_2": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", **BETAS, "clip_sample": False,
        "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    },
    "ddim_with_its_own_defaults": {
        "_class_name": "DDIMScheduler", **BETAS, "clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0,
        "thresholding": False, "timestep_spacing": "leading", "rescale_betas_zero_snr": False,
    },
    "euler": {
        "_class_name": "EulerDiscreteScheduler", **BETAS, "interpolation_type": "linear",
        "prediction_type": "epsilon", "use_karras_sigmas": False, "trained_betas": None,
    },
    "euler_trailing": {
        "_class_name": "EulerDiscreteScheduler", **BETAS, "prediction_type": "epsilon", "set_alpha_to_one": False,
        "sigma_max": None, "sigma_min": None, "steps_offset": 1, "timestep_spacing": "trailing",
        "timestep_type": "discrete", "use_karras_sigmas": False, "clip_sample": False, "skip_prk_steps": True,
    },
    "euler_ancestral": {"_class_name": "EulerAncestralDiscreteScheduler", **BETAS, "steps_offset": 0},
    "lms": {"_class_name": "LMSDiscreteScheduler", **BETAS, "timestep_spacing": "linspace", "steps_offset": 0},
    "dpm": {
        "_class_name": "DPMSolverMultistepScheduler", **BETAS, "algorithm_type": "dpmsolver++", "solver_order": 2,
        "solver_type": "midpoint", "lower_order_final": True, "thresholding": False, "use_karras_sigmas": True,
        "final_sigmas_type": "zero", "prediction_type": "epsilon", "steps_offset": 0, "sample_max_value": 1.0,
        "dynamic_thresholding_ratio": 0.995, "euler_at_final": False, "clip_sample": True, "variance_type": None,
    },
    "unipc": {
        "_class_name": "UniPCMultistepScheduler", **BETAS, "disable_corrector": [], "predict_x0": True,
        "solver_p": None, "solver_type": "bh2", "timestep_spacing": "linspace", "steps_offset": 1,
        "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
    },
    "deis": {
        "_class_name": "DEISMultistepScheduler", **BETAS, "algorithm_type": "deis", "solver_type": "logrho",
        "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading", "clip_sample": False,
    },
}  # fmt: skip
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def as_a_pipeline_holds_it(scheduler: SchedulerMixin) -> SchedulerMixin:
    """What diffusers makes of a scheduler when a Stable Diffusion pipeline is built around it."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False).scheduler


@every_config
@pytest.mark.parametrize("num_steps", [7, 10, 30, 50])
def test_the_timesteps_are_those_of_diffusers_pipelines(config: dict[str, Any], num_steps: int) -> None:
    schedule = NoiseSchedule.from_config(config)
    ddim = as_a_pipeline_holds_it(DDIMScheduler.from_config(config))
    ddim.set_timesteps(num_steps)
    assert list(schedule.ddim_timesteps(num_steps)) == ddim.timesteps.tolist()
    assert schedule.alpha_bars == tuple(ddim.alphas_cumprod.tolist())
    assert schedule.prediction_type == ddim.config.prediction_type
    # The spacing that LEDITS++ is defined by.
    leading = {**config, "timestep_spacing": "leading", "use_karras_sigmas": False}
    dpm = as_a_pipeline_holds_it(
        DPMSolverMultistepScheduler.from_config(leading, algorithm_type="sde-dpmsolver++", solver_order=2)
    )
    dpm.set_timesteps(num_steps)
    assert list(schedule.dpm_timesteps(num_steps)) == dpm.timesteps.tolist()


@every_config
@pytest.mark.parametrize("solver", ["ddim", "sde-dpmsolver++"])
def test_ddpm_inversion_is_exact(config: dict[str, Any], solver: str) -> None:
    backbone = analytic()
    given = dataclasses.replace(source(backbone, 0), schedule=NoiseSchedule.from_config(config))
    inversion = DDPMInversion(num_steps=8, solver=solver)  # type: ignore[arg-type]
    engine = Engine(backbone, call_size=8)
    _, edited = engine.run_one(invert_and_edit(given, EditRequest(), inversion, Reconstruct()))
    torch.testing.assert_close(edited.latents, given.latents, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "LCMScheduler", "TCDScheduler", "MyScheduler", None],
)
def test_a_scheduler_of_another_diffusion_is_refused_by_its_class(name: Any) -> None:
    with pytest.raises(ModelError, match=f"scheduler is {name}, .*known are DDIMScheduler, "):
        NoiseSchedule.from_config({**CONFIGS["sd_1"], "_class_name": name})
