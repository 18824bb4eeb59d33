"""Laws of volumes that grow slice by slice: who depends on whom, what stays empty, what training is shown."""

from __future__ import annotations

import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor, list_data_collate
from monai.networks import one_hot
from monai.networks.utils import pixelshuffle, pixelunshuffle
from monai.transforms import Compose
from torch import nn

from common.autoencoder import LatentSpace, LDMAutoencoder
from common.sampler import DiffusionSampler
from common.schedules import DDIM, DDPM
from common.slices import (
    EncodedCondition,
    GreyCondition,
    LabelsToGrid,
    PlanesCondition,
    RandSlicesd,
    SliceConditiond,
    SliceMomentsd,
    SliceSampler,
    slice_seed,
    to_unit_range,
)
from common.solvers import DPMSolverPP
from common.unet import DiffusionUNet

T, N, K, SIZE = 50, 3, 4, (6, 5, 7)
SCHEDULERS = {
    "DDPM": lambda: DDPM(T, "cosine_exact"),
    "DDIM-eta": lambda: DDIM(T, "cosine_exact", eta=0.7),
    "DPM-3": lambda: DPMSolverPP(T, "cosine_exact", order=3),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
# First and last labelled slice of each case; the second has a slice without labels between them.
EXTENTS = ((1, 4), (2, 6), (0, 0))
LABELLED = torch.tensor([[first <= z <= last for z in range(SIZE[2])] for first, last in EXTENTS])


class Stub:
    """Predicts from state, slice before and first plane of the condition, entry by entry, and keeps what it saw."""

    def __init__(self, channels: int = 1) -> None:
        self.channels = channels
        self.seen: list[torch.Tensor] = []

    def __call__(self, joined, t):
        self.seen.append(joined.clone())
        c = self.channels
        return 0.3 * joined[:, :c] + 0.2 * joined[:, c : 2 * c] + 0.1 * joined[:, 2 * c : 2 * c + 1]

    @property
    def before(self) -> list[torch.Tensor]:
        """The slices before, as told in the first step of each slice."""
        return [joined[:, self.channels : 2 * self.channels] for joined in self.seen[::N]]


def layouts(seed: int = 0) -> torch.Tensor:
    """Label maps (3, 1, X, Y, Z) with labels exactly in `EXTENTS`, but for one slice within."""
    labels = torch.randint(0, K, (3, 1, *SIZE), generator=torch.Generator().manual_seed(seed)).float()
    labels[:, :, 0, 0] = 1
    labels = labels * LABELLED[:, None, None, None]
    labels[1, ..., 4] = 0
    return labels


def sampler_of(scheduler=SCHEDULERS["DDPM"], channels: int = 1, condition=None, **options) -> SliceSampler:
    one = DiffusionSampler(scheduler(), N, channels=channels, seed=4)
    return SliceSampler(one, condition or PlanesCondition(K), **options)


def slices_of(volume: torch.Tensor, mask: torch.Tensor = LABELLED) -> torch.Tensor:
    """The slices (n, C, X, Y) that a mask (B, Z) names."""
    return volume.movedim(-1, 1)[mask]


# ---------------------------------------------------------------------------------------------------------------------
# Who depends on whom


@every_scheduler
def test_a_batch_equals_its_cases_one_by_one_whatever_their_extents(scheduler):
    run, inputs, seeds = sampler_of(scheduler), layouts(), [11, 12, 13]
    together = run(inputs, Stub(), seeds=seeds)
    assert together.shape == (3, 1, *SIZE)
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    assert torch.equal(run(inputs.flip(0), Stub(), seeds=seeds[::-1]).flip(0), together)
    for b in range(3):
        assert torch.equal(run(inputs[b : b + 1], Stub(), seeds=torch.tensor(seeds[b : b + 1])), together[b : b + 1])


def test_a_real_network_agrees_closely_between_batches():
    torch.manual_seed(0)
    network = DiffusionUNet(2, 2 + K, 1, channels=(8, 8), attention_levels=(False, True), num_res_blocks=1,
                            norm_num_groups=4, num_head_channels=8).eval()  # fmt: skip
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape)
    inputs = torch.nn.functional.pad(layouts()[..., :4], (0, 0, 0, 3, 0, 2))  # (8, 8, 4): sides that halve
    run = sampler_of(SCHEDULERS["DPM-3"])
    together = run(inputs, network, seeds=[1, 2, 3])
    for b in range(3):
        alone = run(inputs[b : b + 1], network, seeds=[b + 1])
        torch.testing.assert_close(alone, together[b : b + 1], atol=1e-4, rtol=1e-4)


def test_the_seed_fixes_the_volume():
    run, inputs = sampler_of(), layouts()
    first = run(inputs, Stub(), seeds=[1, 2, 3])
    assert torch.equal(run(inputs, Stub(), seeds=[1, 2, 3]), first)
    other = run(inputs, Stub(), seeds=[1, 2, 4])
    assert torch.equal(other[:2], first[:2])
    assert not torch.equal(other[2], first[2])
    assert torch.equal(run(inputs, Stub()), run(inputs, Stub(), seeds=[4, 5, 6])), "without seeds: the sampler's"
    with pytest.raises(ValueError, match="2 seeds for 3 cases"):
        run(inputs, Stub(), seeds=[1, 2])


def test_every_slice_of_every_case_draws_anew():
    seeds = {slice_seed(case, z) for case in range(20) for z in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    same = torch.ones(1, 1, 4, 4, 3)
    volume = sampler_of()(same, lambda joined, t: 0 * joined[:, :1])
    assert not torch.equal(volume[..., 0], volume[..., 1])


def test_a_slice_depends_on_what_is_below_and_not_on_what_is_above():
    run, inputs = sampler_of(), layouts()
    volume = run(inputs, Stub())
    for z in (2, 3):  # within the first case
        changed = inputs.clone()
        changed[0, ..., z] = inputs[0, ..., z].flip(-1) + 1 - inputs[0, ..., z] // 3 * 3
        changed = changed.clamp(0, K - 1)
        drawn = run(changed, Stub())
        assert torch.equal(drawn[0, ..., :z], volume[0, ..., :z])
        assert not any(torch.equal(drawn[0, ..., above], volume[0, ..., above]) for above in range(z, 5))
        assert torch.equal(drawn[1:], volume[1:])


def test_empty_slices_above_change_nothing():
    """Below they do: a slice's draw belongs to its place."""
    run, inputs = sampler_of(), layouts()
    taller = run(torch.nn.functional.pad(inputs, (0, 3)), Stub())
    assert torch.equal(taller[..., : SIZE[2]], run(inputs, Stub()))
    assert (taller[..., SIZE[2] :] == -1).all()


def test_the_slice_before_reaches_the_network_and_the_first_sees_zeros():
    network, inputs = Stub(), layouts()[:1]
    volume = sampler_of()(inputs, network)
    assert len(network.before) == 4
    assert not network.before[0].any()
    for z, before in zip((2, 3, 4), network.before[1:], strict=True):
        assert torch.equal(before, volume[..., z - 1])
    for z, joined in zip((1, 2, 3, 4), network.seen[::N], strict=True):
        assert torch.equal(joined[:, 2:], one_hot(inputs[..., z], K)), "the slice's own labels"
    assert all(torch.equal(joined[:, 1:], network.seen[i // N * N][:, 1:]) for i, joined in enumerate(network.seen))


def test_cases_that_start_later_see_zeros_first_and_then_their_own():
    network, inputs = Stub(), layouts()[:2]
    volume = sampler_of()(inputs, network)
    assert [len(before) for before in network.before] == [1, 2, 2, 2, 1, 1], "slices 1 to 6"
    second, third = network.before[1:3]
    assert torch.equal(second[0], volume[0, ..., 1])
    assert not second[1].any()
    assert torch.equal(third, volume[..., 2])


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn, and how often


def test_slices_from_the_first_labelled_to_the_last_are_drawn_and_the_rest_is_outside():
    network = Stub()
    volume = sampler_of(outside=-7.0)(layouts(), network)
    assert (slices_of(volume, ~LABELLED) == -7).all()
    assert (slices_of(volume) != -7).all(), "also where labels are missing within"
    assert len(network.seen) == int(LABELLED.any(dim=0).sum()) * N
    assert sum(len(joined) for joined in network.seen) == int(LABELLED.sum()) * N, "no case is drawn in vain"


def test_an_empty_label_map_gives_an_empty_volume():
    run, inputs, network = sampler_of(outside=-7.0), layouts(), Stub()
    assert (run(torch.zeros_like(inputs), network) == -7).all()
    assert network.seen == []
    mixed = torch.cat([inputs[:1], torch.zeros_like(inputs[:1])])
    volume = run(mixed, network, seeds=[4, 5])
    assert (volume[1] == -7).all()
    assert torch.equal(volume[:1], run(inputs[:1], Stub(), seeds=[4]))


def test_a_lead_draws_slices_below_that_have_no_labels():
    inputs, network = layouts(), Stub()
    volume = sampler_of(lead=1, outside=-7.0)(inputs, network)
    led = LABELLED | LABELLED.roll(-1, dims=1)
    led[:, -1] = LABELLED[:, -1]  # what was rolled around
    assert (slices_of(volume, ~led) == -7).all()
    assert (slices_of(volume, led) != -7).all()
    assert not network.before[0].any()
    alone = Stub()
    sampler_of(lead=1)(inputs[:1], alone)
    assert len(alone.seen) == 5 * N
    assert (alone.seen[0][:, 2] == 1).all(), "the lead is told of background alone"
    assert torch.equal(alone.before[1], volume[:1, ..., 0]), "and the first labelled slice of the lead"


def test_decoding_comes_last_in_chunks_and_in_order():
    inputs = layouts()
    states = sampler_of()(inputs, Stub())
    for chunk in (1, 4, 5, 100):
        calls: list[int] = []

        def decode(z, calls=calls):
            calls.append(len(z))
            return (z + 10).repeat(1, 2, 1, 1)  # two channels

        volume = sampler_of(decode=decode, chunk=chunk)(inputs, Stub())
        assert volume.shape == (3, 2, *SIZE)
        assert torch.equal(slices_of(volume), (slices_of(states) + 10).repeat(1, 2, 1, 1)), "states stay undecoded"
        assert (slices_of(volume, ~LABELLED) == -1).all()
        assert max(calls) <= chunk
        assert (sum(calls), len(calls)) == (int(LABELLED.sum()), -(-int(LABELLED.sum()) // chunk))


def test_states_may_be_smaller_than_labels():
    one = DiffusionSampler(DDIM(T), N, channels=3, latent_shape=(3, 2))
    run = SliceSampler(one, PlanesCondition(K, factor=2), decode=lambda z: z.repeat_interleave(2, 2)
                       .repeat_interleave(2, 3)[:, :1])  # fmt: skip
    network = Stub(channels=3)
    volume = run(layouts()[:, :, :, :4], network)
    assert volume.shape == (3, 1, 6, 4, 7)
    assert {joined.shape[1:] for joined in network.seen} == {(3 + 3 + 4 * K, 3, 2)}
    assert torch.equal(volume[:, :, ::2], volume[:, :, 1::2])


def test_the_published_rescaling_stretches_a_batch_and_couples_its_cases():
    network, inputs = Stub(), layouts()
    run = sampler_of(rescale=to_unit_range, outside=0.0)
    together = run(inputs, network)
    for z in range(SIZE[2]):
        drawn = together[LABELLED[:, z], ..., z]
        assert (drawn.min().item(), drawn.max().item()) == (0, 1)
    assert all(before.min() >= 0 and before.max() <= 1 for before in network.before), "the stretched state counts"
    alone = run(inputs[1:2], Stub(), seeds=[5])
    assert not torch.equal(alone, together[1:2])


def test_a_noise_source_takes_the_place_of_the_seeds():
    shapes = []

    def zeros(x):
        shapes.append(tuple(x.shape))
        return torch.zeros_like(x)

    run = sampler_of(SCHEDULERS["DPM-3"], condition=GreyCondition())
    volume = run(layouts() * 0 + LABELLED[:, None, None, None], lambda joined, t: joined[:, :1], noise=zeros)
    assert not slices_of(volume).any()
    assert shapes == [(int(n), 1, *SIZE[:2]) for n in LABELLED.sum(dim=0)]


def test_metatensors_go_in_plain_tensors_come_out_and_nothing_else_is_touched():
    inputs, before = layouts(), torch.random.get_rng_state()
    kept = inputs.clone()
    volume = sampler_of()(MetaTensor(inputs), Stub())
    assert type(volume) is torch.Tensor
    assert torch.equal(volume, sampler_of()(inputs.to(torch.uint8), Stub())), "labels of any type"
    assert torch.equal(inputs, kept)
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = torch.ones(1, requires_grad=True)
    assert not sampler_of()(inputs, lambda joined, t: weight * joined[:, :1]).requires_grad
    for shape in ((3, 6, 5, 7), (3, 2, 6, 5, 7)):
        with pytest.raises(ValueError, match=r"expected label maps \(B, 1, X, Y, Z\)"):
            sampler_of()(torch.zeros(shape), Stub())


def test_the_bar_is_quiet_where_nobody_watches(capfd):
    for verbose in (True, False):
        sampler_of(verbose=verbose)(layouts(), Stub())
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# What the network is told


class Fold(nn.Module):
    """An autoencoder without loss: patches of 2 x 2 become channels, plus 1, so that zeros decode to something."""

    def encode(self, image):
        mean = pixelunshuffle(image, 2, 2) + 1
        return mean, 0.1 * mean.abs() + 0.01

    def decode(self, latent):
        return pixelshuffle(latent - 1, 2, 2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_planes_unfold_to_the_one_hot_labels(factor):
    layout, previous = torch.randint(0, K, (2, 1, 8, 4)), normal(2, 3, 8 // factor, 4 // factor)
    told = PlanesCondition(K, factor)(previous, layout)
    assert told.dtype == torch.float32
    assert torch.equal(told[:, :3], previous)
    planes = told[:, 3:]
    assert planes.shape == (2, K * factor**2, 8 // factor, 4 // factor)
    unfolded = planes if factor == 1 else pixelshuffle(planes, 2, factor)
    assert torch.equal(unfolded, one_hot(layout, K).float())


def test_the_published_shade_is_the_label_of_255():
    layout, previous = torch.tensor([0, 1, 11, 255]).view(1, 1, 2, 2), normal(1, 1, 2, 2)
    told = GreyCondition()(previous, layout)
    assert torch.equal(told[:, :1], previous)
    assert torch.equal(told[:, 1].flatten(), torch.tensor([0, 1, 11, 255]) / 255)


def test_the_encoded_condition_is_the_mean_of_the_decoded_slice_and_its_shade():
    latents, pairs = LatentSpace(Fold(), 0.5), LatentSpace(Fold(), 3.0)
    slices, layout = normal(3, 1, 4, 6), torch.randint(0, K, (3, 1, 4, 6))
    previous = latents.moments(slices)[0]
    previous[1] = 0
    told = EncodedCondition(latents, pairs)(previous, layout)
    slices[1] = 0  # no slice before is an empty slice, whatever zeros decode to
    assert latents.decode(torch.zeros(1, 4, 2, 3)).any()
    assert told.shape == (3, 8, 2, 3)
    torch.testing.assert_close(told, pairs.moments(torch.cat([slices, layout / 255], dim=1))[0])


@pytest.mark.parametrize("condition", [PlanesCondition(K), PlanesCondition(K, 2), GreyCondition()],
                         ids=["planes", "folded", "grey"])  # fmt: skip
def test_training_is_told_what_sampling_is_told(condition):
    layout = torch.randint(0, K, (1, 4, 6))
    previous = normal(2, 2, 3) if getattr(condition, "factor", 1) == 2 else normal(1, 4, 6)
    data = {"layout": MetaTensor(layout), "previous": previous, "name": "a"}
    told = SliceConditiond(condition)(data)
    assert torch.equal(told["condition"], condition(previous[None], layout[None])[0])
    assert {k: told[k] for k in data} == data
    assert "condition" not in data


# ---------------------------------------------------------------------------------------------------------------------
# Training


def case(name: str = "a", depth: int = 7, first: int = 2, last: int = 5) -> dict:
    """A case whose image holds z + 1 in slice z; one slice between its labelled ones has no label."""
    layout = torch.zeros(1, 3, 3, depth)
    layout[:, 1, 1, [first, last]] = 2
    layout[:, 0, :, first + 1] = 1
    image = torch.arange(1.0, depth + 1).expand(1, 3, 3, depth).clone()
    return {"image": MetaTensor(image), "layout": MetaTensor(layout), "mean": image.repeat(4, 1, 1, 1), "name": name}


def places(items: list[dict]) -> list[int]:
    return [int(item["image"][0, 0, 0]) - 1 for item in items]


def test_only_slices_between_labels_are_picked_each_with_the_one_below():
    rand = RandSlicesd(["image", "layout"], "image", 3).set_random_state(0)
    came = set()
    for _ in range(30):
        items = rand(case())
        assert len({*places(items)}) == 3, "no slice twice while there are enough"
        came |= {*places(items)}
        for item in items:
            assert item["image"].shape == item["previous"].shape == item["layout"].shape == (1, 3, 3)
            assert (item["previous"] == item["image"] - 1).all()
            assert torch.equal(item["layout"], case()["layout"].as_tensor()[..., places([item])[0]])
            assert item["name"] == "a"
            assert (item["mean"].shape, type(item["image"])) == ((4, 3, 3, 7), torch.Tensor), "what is no key stays"
    assert came == {2, 3, 4, 5}


def test_the_condition_may_be_of_another_kind_than_the_image():
    item = RandSlicesd(["image", "mean", "layout"], "mean").set_random_state(1)(case())[0]
    assert item["previous"].shape == item["mean"].shape == (4, 3, 3)
    assert torch.equal(item["previous"] + 1, item["mean"])


def test_the_lowest_slice_has_none_before_it():
    items = RandSlicesd(["image", "layout"], "image", None)(case(first=0))
    assert places(items) == [0, 1, 2, 3, 4, 5]
    assert not items[0]["previous"].any()
    assert all(item["previous"].any() for item in items[1:])


def test_none_gives_every_slice_in_order_and_draws_nothing():
    rand = RandSlicesd(["image", "layout"], "image", None, blank=1.0).set_random_state(3)
    state = rand.R.get_state()
    items = rand(case())
    assert places(items) == [2, 3, 4, 5]
    assert all((item["previous"] == item["image"] - 1).all() for item in items), "nor is any blanked"
    assert all((a == b).all() if hasattr(a, "all") else a == b for a, b in zip(rand.R.get_state(), state, strict=True))


def test_some_slices_are_shown_none_before():
    def blanked(blank: float) -> float:
        items = RandSlicesd(["image", "layout"], "image", 300, blank=blank).set_random_state(0)(case())
        assert all(not i["previous"].any() or (i["previous"] == i["image"] - 1).all() for i in items)
        return sum(not item["previous"].any() for item in items) / len(items)

    assert (blanked(0.0), blanked(1.0)) == (0, 1)
    assert blanked(0.3) == pytest.approx(0.3, abs=0.08)


def test_a_case_with_too_few_slices_gives_some_twice():
    items = RandSlicesd(["image", "layout"], "image", 9).set_random_state(0)(case(first=3, last=4))
    assert len(items) == 9
    assert set(places(items)) == {3, 4}


def test_the_random_state_fixes_the_choice():
    def choice(seed: int) -> list:
        rand = RandSlicesd(["image", "layout"], "image", 2, blank=0.5).set_random_state(seed)
        return [(places([item]), bool(item["previous"].any())) for _ in range(10) for item in rand(case())]

    assert choice(5) == choice(5)
    assert choice(5) != choice(6)


def test_cases_that_teach_nothing_and_counts_that_mean_nothing_are_refused():
    empty = case("hollow")
    empty["layout"] = empty["layout"] * 0
    with pytest.raises(ValueError, match="case hollow: layout is all background, no slice to learn"):
        RandSlicesd(["image", "layout"], "image")(empty)
    with pytest.raises(ValueError, match="num_slices must be at least 1, or None for all, got 0"):
        RandSlicesd(["image"], "image", 0)


def test_in_monais_datasets_the_case_is_cached_and_the_choice_is_not():
    encoded = []

    class Watched(SliceMomentsd):
        def __call__(self, data):
            encoded.append(data["name"])
            return super().__call__(data)

    pick = RandSlicesd(["mean", "std", "layout"], "mean", 2, blank=0.2)
    tell = SliceConditiond(PlanesCondition(K, 2))
    chain = Compose([Watched("image", LatentSpace(Fold(), 0.5)), pick, tell])
    cases = [
        {"image": normal(1, 4, 4, 9, seed=i), "layout": torch.ones(1, 4, 4, 9), "name": name}
        for i, name in enumerate("abc")
    ]
    loader = DataLoader(CacheDataset(cases, chain, progress=False), batch_size=3, collate_fn=list_data_collate)
    epochs = [batch for _ in range(3) for batch in loader]
    assert encoded == ["a", "b", "c"]
    for batch in epochs:
        assert batch["mean"].shape == batch["std"].shape == batch["previous"].shape == (6, 4, 2, 2)
        assert batch["layout"].shape == (6, 1, 4, 4)
        assert batch["condition"].shape == (6, 4 + 4 * K, 2, 2)
        assert batch["name"] == ["a", "a", "b", "b", "c", "c"]
    assert not torch.equal(epochs[0]["mean"], epochs[1]["mean"])
    assert not torch.equal(epochs[1]["mean"], epochs[2]["mean"])


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_moments_of_a_volume_are_those_of_its_slices(chunk):
    torch.manual_seed(0)
    latents = LatentSpace(LDMAutoencoder(2, 1, 1, channels=(4, 8), num_res_blocks=1, latent_channels=3,
                                         norm_num_groups=4), 0.7)  # fmt: skip
    data = {"image": MetaTensor(normal(1, 8, 6, 5)), "name": "a"}
    made = SliceMomentsd("image", latents, chunk=chunk)(data)
    assert made["mean"].shape == made["std"].shape == (3, 4, 3, 5)
    for z in range(5):
        mean, std = latents.moments(data["image"].as_tensor()[None, ..., z])
        torch.testing.assert_close(made["mean"][..., z], mean[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(made["std"][..., z], std[0], atol=1e-5, rtol=1e-4)
    assert (made["std"] > 0).all()
    assert made["image"] is data["image"]
    assert set(data) == {"image", "name"}


# ---------------------------------------------------------------------------------------------------------------------
# From the labels' grid to the images'

spaces = pytest.mark.parametrize("size", [(5, 4), (5, 4, 3)], ids=["2-D", "3-D"])


@spaces
def test_labels_keep_their_values_and_at_their_own_size_their_places(size):
    labels = torch.randint(0, K, (2, 1, *size)).float()
    assert torch.equal(LabelsToGrid(size)(labels), labels)
    twice = labels
    for axis in range(2, labels.ndim):
        twice = twice.repeat_interleave(2, axis)
    assert torch.equal(LabelsToGrid([2 * n for n in size])(labels), twice)
    assert set(LabelsToGrid([n + 2 for n in size])(labels).unique().tolist()) <= set(range(K))


@spaces
def test_probabilities_become_the_likeliest_class(size):
    probabilities = (2 * normal(2, K, *size)).softmax(dim=1)
    likeliest = probabilities.argmax(dim=1, keepdim=True).float()
    same = LabelsToGrid(size)(probabilities)
    assert torch.equal(same, likeliest)
    assert same.dtype == torch.float32
    larger = LabelsToGrid([4 * n for n in size])(probabilities)
    assert larger.shape == (2, 1, *(4 * n for n in size))
    assert set(larger.unique().tolist()) <= set(range(K))
    certain = LabelsToGrid([3 * n for n in size])(one_hot(likeliest, K))
    middles = (..., *(slice(1, None, 3) for _ in size))
    assert torch.equal(certain[middles], likeliest), "a voxel's centre keeps its class"


@spaces
def test_what_is_likelier_grows(size):
    probabilities, grid = (2 * normal(1, K, *size)).softmax(dim=1), LabelsToGrid([3 * n for n in size])
    inside = []
    for factor in (0.2, 1.0, 3.0, 50.0):
        favoured = probabilities.clone()
        favoured[:, 2] *= factor
        inside.append(grid(favoured / favoured.sum(dim=1, keepdim=True)) == 2)
    counts = [int(mask.sum()) for mask in inside]
    assert counts[0] < counts[1] < counts[2] < counts[3]


def test_probabilities_make_smooth_edges_where_labels_make_stairs():
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    signed = 5 - ((x - 7.5) ** 2 + (y - 7.5) ** 2).sqrt()
    probabilities = torch.stack([-signed, signed]).softmax(dim=0)[None]
    fine = torch.meshgrid(*[(torch.arange(64.0) + 0.5) / 4 - 0.5] * 2, indexing="ij")
    disc = ((fine[0] - 7.5) ** 2 + (fine[1] - 7.5) ** 2).sqrt() < 5
    grid = LabelsToGrid((64, 64))
    smooth, stairs = grid(probabilities)[0, 0] > 0, grid(probabilities.argmax(1, keepdim=True).float())[0, 0] > 0
    assert (smooth != disc).sum() < 0.3 * (stairs != disc).sum()
