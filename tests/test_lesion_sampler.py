"""From plan to painted CT, with stubs for the networks: what is kept, what is changed, what depends on what.

The published program replaces the whole scan by its reconstruction, clipped to +-1000 HU, lets a mask lie anywhere,
fails on scans smaller than its crops, and skips the first case: each is named below.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from test_lesion_plan import LIVER, ball, planner, scan
from torch import Tensor

from common.lesion_geometry import to_unit
from common.lesion_sampler import LesionSampler
from common.text import PhraseEncoder

TUMOUR = 150.0  # HU that the stub paints


class Latents:
    """The image itself as latents."""

    def encode(self, image: Tensor) -> Tensor:
        return image.clone()

    def decode(self, latent: Tensor) -> Tensor:
        return latent


class Masks:
    """Draws a blob as large as the crop: what is left of it is what was allowed."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, condition: Tensor, network: Any, *, context: Tensor, seeds: list[int]) -> Tensor:
        self.calls.append({"condition": condition, "context": context, "seeds": seeds})
        grid = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in condition.shape[2:]], indexing="ij")
        shift = 0.1 * torch.randn(3, generator=torch.Generator().manual_seed(seeds[0] % 2**31))
        return (1 - torch.stack([(g - s).square() for g, s in zip(grid, shift)]).sum(0).sqrt())[None, None]


class Painter:
    """Paints one density."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, inputs: Tensor, network: Any, *, context: Tensor, seeds: list[int]) -> Tensor:
        self.calls.append({"inputs": inputs, "context": context, "seeds": seeds})
        return torch.where(inputs[:, 1:] > 0, to_unit(torch.tensor(TUMOUR)), inputs[:, :1])


def sampler(**kwargs: Any) -> LesionSampler:
    sizes = {"spacing": (3, 3, 3), "mask_size": (32, 32, 32), "image_size": (32, 32, 32)}
    return LesionSampler(Masks(), None, Painter(), Latents(), PhraseEncoder(), **{**sizes, **kwargs})


def batch(data: dict[str, Any]) -> Tensor:
    return data["image"].as_tensor()[None]


def made(data: dict[str, Any], seed: int = 3, **kwargs: Any) -> tuple[Tensor, Tensor, LesionSampler]:
    """CT and label of one planned case, and the sampler with its stubs."""
    chain = sampler(**kwargs)
    image, label = chain(batch(data), None, plans=[data["plan"]], seeds=[seed])[0]
    return image, label, chain


def test_only_the_lesion_and_its_rim_change() -> None:
    """HU outside keep their bits, metal of 3000 HU included, which the reference clips."""
    data = planner(wish={"organ": "liver", "size_mm": [18, 18, 18]})(scan())
    image, label, _ = made(data)
    before, lesion = torch.as_tensor(data["image"][0]), label == 2
    near = torch.from_numpy(ball((7, 7, 7), (3, 3, 3), 3.1)).float()[None, None]
    rim = torch.nn.functional.conv3d(lesion[None, None].float(), near, padding=3)[0, 0] > 0
    assert torch.equal(image[~rim], before[~rim])
    assert image[0, 0, 0] == 3000
    assert lesion.sum() > 20
    assert torch.allclose(image[lesion], torch.tensor(TUMOUR), atol=0.5)
    assert set(label.unique().tolist()) == {0, 1, 2}
    assert torch.equal(label > 0, torch.as_tensor(data["image"][1] == LIVER) | lesion)


def test_mask_stays_in_its_box_and_within_the_organ() -> None:
    """The reference's may lie anywhere; its threshold aims at the whole box."""
    wish = {"organ": "liver", "size_mm": [18, 18, 18], "attributes": {"cavity": "within the parenchymal organ"}}
    data = planner(wish=wish)(scan())
    _, label, _ = made(data)
    lesion = (label == 2).nonzero()
    assert ((lesion.max(0).values - lesion.min(0).values) < 6 + 2).all()
    assert (torch.as_tensor(data["image"][1])[label == 2] == LIVER).all()
    assert 0.2 <= len(lesion) / 6**3 <= 0.75


def test_a_given_mask_is_painted_as_it_is() -> None:
    data = planner()(scan(label=True))
    given = torch.as_tensor(data["image"][2]) > 0
    image, label, chain = made(data)
    assert torch.equal(label == 2, given)
    assert not chain.mask_sampler.calls, "LMNet is not asked"
    assert torch.allclose(image[given], torch.tensor(TUMOUR), atol=0.5)


def test_later_lesions_see_earlier_ones_and_do_not_overlap_them() -> None:
    wish = {"organ": "liver", "size_mm": [12, 12, 12]}
    data = planner(wish=wish, num_lesions=2)(scan())
    _, label, chain = made(data)
    first, second = (call["inputs"][0, 0] for call in chain.painter.calls)
    assert not (first == to_unit(torch.tensor(TUMOUR))).any()
    assert ((second - to_unit(torch.tensor(TUMOUR))).abs() < 1e-4).any()
    one = dict(data, plan=json.dumps({**(plan := json.loads(data["plan"])), "lesions": plan["lesions"][:1]}))
    assert (made(one)[1] == 2).sum() < (label == 2).sum()


def test_words_reach_both_networks() -> None:
    calls = {}
    for density in ("hypodense lesion", "hyperdense lesion"):
        wish = {"organ": "liver", "size_mm": [18, 18, 18], "attributes": {"density": density, "CT value": "60 HU"}}
        _, _, chain = made(planner(wish=wish)(scan()))
        calls[density] = chain.mask_sampler.calls[0]["context"], chain.painter.calls[0]["context"]
    (mask_a, image_a), (mask_b, image_b) = calls.values()
    assert mask_a.shape == (1, 10, 64)
    assert torch.equal(mask_a, mask_b), "the density is not LMNet's concern"
    assert not torch.equal(image_a, image_b)


def test_an_ill_defined_margin_fades_further() -> None:
    wish = {"organ": "liver", "size_mm": [18, 18, 18], "location": "central"}
    changed = []
    for margin in ("well-defined margin", "ill-defined margin"):
        data = planner(wish={**wish, "attributes": {"surface characteristics": margin}})(scan())
        image, label, _ = made(data)
        around = (image != data["image"][0].as_tensor()) & (label != 2)
        changed.append(int(around.sum()))
    assert changed[1] > 2 * changed[0] > 0


def test_batch_equals_cases_and_seeds_decide() -> None:
    cases = [planner(wish={"organ": organ, "size_mm": [15, 15, 15]})(scan()) for organ in ("liver", "bladder")]
    together = sampler()(torch.cat([batch(c) for c in cases]), None, plans=[c["plan"] for c in cases], seeds=[3, 8])
    alone = [torch.stack(made(case, seed)[:2]) for case, seed in zip(cases, (3, 8))]
    assert torch.equal(together, torch.stack(alone)), "the first case, too, which the reference skips"
    assert torch.equal(made(cases[0], 3)[1], made(cases[0], 3)[1])
    assert not torch.equal(made(cases[0], 3)[1], made(cases[0], 4)[1])


def test_plan_on_the_image_is_enough() -> None:
    """MONAI Label hands an inferer the image and the network, no more."""
    data = planner(wish={"organ": "liver", "size_mm": [18, 18, 18]})(scan())
    image = MetaTensor(data["image"])[None]
    plain = sampler(seed=3)(batch(data), None, plans=[data["plan"]], seeds=[3])
    assert torch.equal(sampler(seed=3)(image, None), plain)
    with pytest.raises(ValueError, match="no plan came with the image"):
        sampler()(batch(data), None)


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([3.0, 3, 3, 1]),
        np.diag([-1.0, 1, 5, 1]),
        np.array([[0, 0, 2.0, 5], [-2, 0, 0, 9], [0, 2, 0, 1], [0, 0, 0, 1]]),
    ],
    ids=["small", "thick slices", "turned"],
)
def test_any_grid_and_scans_smaller_than_the_crop(affine: np.ndarray) -> None:
    """The reference assumes 1 mm whatever the file says, and fails or pads with water where a scan is small."""
    shape = (26, 24, 20)
    organs = np.where(ball(shape, (13, 12, 10), 8), LIVER, 0)
    data: dict[str, Any] = {"name": "a", "seed": 1}
    for key, volume in {"image": np.where(organs, 60, -900), "organs": organs}.items():
        data[key] = MetaTensor(torch.from_numpy(volume)[None].float(), affine=torch.from_numpy(affine))
    spacing = (2, 2, 2)
    data = planner(wish={"organ": "liver", "size_mm": [10, 10, 10]}, spacing=spacing)(data)
    image, label, _ = made(data, spacing=spacing)
    lesion = label == 2
    assert lesion.any()
    volume = float(lesion.sum()) * abs(np.linalg.det(affine[:3, :3]))
    assert 0.15 * 10**3 < volume < 1.2 * 10**3, "true millimetres"
    assert image[lesion].mean() > 100
    assert (image[torch.as_tensor(data["image"][1]) == 0] <= 0).all()


def test_a_mask_that_does_not_stand_out_is_still_a_lesion(caplog: pytest.LogCaptureFixture) -> None:
    """One odd draw must not end a run of many cases."""
    chain = sampler(tries=2)
    chain.mask_sampler = lambda condition, network, context, seeds: 1e-3 * torch.rand(1, 1, *condition.shape[2:])
    data = planner(wish={"organ": "liver", "size_mm": [18, 18, 18]})(scan())
    label = chain(batch(data), None, plans=[data["plan"]])[0, 1]
    assert 0.3 < (label == 2).sum() / 6**3 < 0.6
    assert "the highest values are taken" in caplog.text
