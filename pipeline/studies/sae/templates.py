"""Templates of concepts: by how much codes differ, place by place, where images show a concept.

A thing of several parts, such as a pair of glasses, is other features at every place of a map, so that no one direction
writes it. Images show many things at once, and few of them: all tags are fitted together, so that one is not credited
with what comes from another that happened to be beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.interventions import Template
from pipeline.studies.sae.codes import CodedImages

RIDGE = 1.0  # images: a tag that as many show is half believed


def templates_of(images: CodedImages, size: int) -> Iterator[tuple[str, Template]]:
    """Of every tag that some images show and others do not its name and template, each place with its `size` largest
    codes.

    The codes z of an image at a place are fitted by z = a + sum over its tags of b_tag, by least squares with a ridge
    on all b; a template is b. Of values of which every image has one (such as a background's colour) a has the mean:
    their templates are differences from it, and the difference of two is what tells one from the other.
    """
    shows = images.covered.view(len(images.ids), images.places, -1).any(dim=1).double()  # (images, T)
    centred = shows - shows.mean(dim=0)  # hence a needs no column of its own
    ridge = RIDGE * torch.eye(len(images.tags), dtype=torch.float64)
    parts = torch.linalg.solve(centred.mT @ centred + ridge, centred.mT)  # (T, images)
    for tag, name in enumerate(images.tags):
        if not bool(centred[:, tag].any()):
            continue  # nothing to tell it from
        yield name, _strongest(_weighted(images, parts[tag]), images.grid, size)


def _weighted(images: CodedImages, weights: Tensor) -> Tensor:
    """(places, F): the sum of images' codes, each times its weight."""
    places = torch.arange(images.places).repeat(len(images.ids))[:, None].expand_as(images.features)
    values = images.values.double() * weights.repeat_interleave(images.places)[:, None]
    found = torch.zeros((images.places, images.num_features), dtype=torch.float64)
    return found.index_put((places, images.features), values, accumulate=True).float()


def _strongest(codes: Tensor, grid: tuple[int, int], size: int) -> Template:
    """A template that keeps the `size` largest codes (places, F) of each place."""
    kept = codes.abs().topk(min(size, codes.shape[1]), dim=1).indices
    sparse = torch.zeros_like(codes).scatter(1, kept, codes.gather(1, kept))
    features = sparse.any(dim=0).nonzero()[:, 0]
    return Template(features=tuple(features.tolist()), maps=sparse[:, features].mT.unflatten(1, grid).contiguous())
