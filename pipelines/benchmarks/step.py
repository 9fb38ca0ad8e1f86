"""A pretraining step, forward and backward: our network and head against the reference network with the paper's dense head.

    python pipelines/benchmarks/step.py --reference ../simple_bev [--networks simplebev/efficientnet-b0 ...] [--no-parts]
    python pipelines/benchmarks/step.py --device cuda --batch 16 --precision bfloat16 [--reference ../simple_bev]

`_reference.py` says where to get the reference. Both networks get the same weights and must agree in F_B and the loss; for this
comparison ours has the reference's defects. Without --reference only ours is measured. Ours is also measured in bfloat16, and
on a GPU also compiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _inputs import find_dataroot
from _step import CHANNELS, FEATURE_DIM, OurStep, ReferenceStep, Setting, Step, peak_megabytes
from _timing import Row, compare, machine, table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from occfeat_train.simple_bev.weights import load_reference
from tests.train.head_twin import DenseHead

NETWORKS = ("simplebev/efficientnet-b0", "simplebev/resnet-50", "bevformer/efficientnet-b0")
REFERENCE, OURS = "reference network, dense head", "ours"
LIMIT = "limit: only the products, at the rate of a large product"
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


def share_weights(ours: OurStep, theirs: ReferenceStep) -> tuple[float, float]:
    """Load the reference's weights into our network, and our head's into the dense head.

    Returns the relative differences of F_B and of the loss.
    """
    load_reference(ours.network, theirs.network.model.state_dict())
    theirs.head = DenseHead.of(ours.head)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        (mine, my_loss), (other, their_loss) = ((s.bev(), s.loss()) for s in (ours, theirs))
    ours.train(), theirs.train()
    difference = ((mine - other).abs().max() / other.abs().max()).item()
    if not difference < _TOLERANCE[ours.setting.precision]:
        raise ValueError(
            f"with the same weights F_B differs by {difference:.1e} of its largest value: not the same network"
        )
    return difference, abs(my_loss.item() / their_loss.item() - 1)


def operations(step: Step) -> float:
    """Operations in convolutions and matrix products of forward and backward. The backward takes twice the forward's."""
    torch.set_num_threads(1)  # products in other threads are not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step.loss()
    torch.set_num_threads(step.setting.threads)
    return 3.0 * counter.get_total_flops()


def large_product(setting: Setting, size: int = 2048) -> tuple[Callable[[], Any], float]:
    """A square matrix product in the step's precision, and its number of operations."""
    dtype = torch.bfloat16 if setting.precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        torch.mm(a, b)
        setting.synchronize()

    return multiply, 2.0 * size**3


def parts_of(ours: OurStep, theirs: ReferenceStep | None) -> dict[str, tuple[Part, Part | None]]:
    """The parts of a SimpleBEV step, ours and the reference's, with given inputs."""
    setting, network, views = ours.setting, ours.network, ours.views
    images = views.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        features = network.encoder(images)
        lifted = network.lifting.lift(features.unflatten(0, views.images.shape[:2]), views)
        compressed = network.lifting.compressor(lifted)
        bev = network.decoder(compressed)
    stacked = features.unflatten(0, views.images.shape[:2])
    mine: dict[str, Part] = {
        "encoder": Part(setting, network.encoder, images, needs_grad=False),
        "lifting": Part(setting, lambda f: network.lifting.lift(f, views), stacked),
        "compressor": Part(setting, network.lifting.compressor, lifted),
        "decoder": Part(setting, network.decoder, compressed),
        "head and losses": Part(setting, lambda f: ours.losses(*ours.predictions(f)), bev),
    }
    if theirs is None:
        return {name: (part, None) for name, part in mine.items()}
    model = theirs.network.model
    volume = theirs.network.lift(stacked, views).detach()
    others: dict[str, Part] = {
        "encoder": Part(setting, model.encoder, images.contiguous(), needs_grad=False),
        "lifting": Part(setting, lambda f: theirs.network.lift(f, views), stacked.contiguous()),
        "compressor": Part(setting, model.bev_compressor, volume),
        "decoder": Part(setting, lambda f: model.decoder(f)["raw_feat"], compressed.contiguous()),
        "head and losses": Part(setting, lambda f: theirs.losses(*theirs.predictions(f)), bev.contiguous()),
    }
    return {name: (part, others[name]) for name, part in mine.items()}


class Part:
    """Forward and backward of a function of one tensor, with a given gradient of the result."""

    def __init__(self, setting: Setting, function: Callable[[Tensor], Tensor], x: Tensor, *, needs_grad: bool = True):
        self.setting, self.function = setting, function
        self.x = x.detach().requires_grad_(needs_grad)

    def __call__(self) -> None:
        self.x.grad = None
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.precision == "bfloat16"):
            out = self.function(self.x)
        out.backward(torch.ones_like(out))
        self.setting.synchronize()


def build_part(setting: Setting, name: str, checkout: Path | None) -> Part:
    mine, other = parts_of(OurStep(setting), None if checkout is None else ReferenceStep(setting, checkout))[name]
    return mine if other is None else other


def print_steps(setting: Setting, checkout: Path | None, seconds: float) -> None:
    ours = OurStep(setting)
    multiply, of_product = large_product(setting)
    contenders: dict[str, Callable[[], Any]] = {OURS: ours}
    builders: dict[str, Any] = {OURS: partial(peak_megabytes, OurStep, setting)}
    if checkout is not None:
        theirs = ReferenceStep(setting, checkout)
        try:
            difference, of_loss = share_weights(OurStep(setting, "simple-bev"), theirs)
            theirs()
        except torch.OutOfMemoryError:
            print(f"The reference does not fit this GPU at batch {setting.batch}: give a smaller --batch to compare.\n")
        else:
            print(f"With the same weights, relative differences: F_B {difference:.1e}, loss {of_loss:.1e}.\n")
            contenders[REFERENCE] = theirs
            builders[REFERENCE] = partial(peak_megabytes, ReferenceStep, setting, checkout)
    others = {"ours, bfloat16": replace(setting, precision="bfloat16")} if setting.precision == "float32" else {}
    if setting.device != "cpu":
        others["ours, compiled"] = replace(setting, compiled=True)
    for name, other in others.items():
        contenders[name] = OurStep(other)
        builders[name] = partial(peak_megabytes, OurStep, other)
    peaks = {name: measure() for name, measure in builders.items()}
    gigaflop = operations(ours) / 1e9
    *rows, product = compare({**contenders, "product": multiply}, ours=OURS, seconds=seconds)
    rate = of_product / product.median / 1e9
    limit = gigaflop / rate
    own = next(row.median for row in rows if row.name == OURS)
    rows.append(Row(LIMIT, limit, (limit, limit), limit / own, None))
    notes = {name: f"{total:,.0f} ({added:,.0f})" for name, (total, added) in peaks.items()}
    notes = {row.name: f"{setting.batch / row.median:.2f} | {notes.get(row.name, '')}" for row in rows}
    print(f"{gigaflop:,.0f} GFLOP per step; a product of 2048 x 2048 runs at {rate:,.0f} GFLOP/s\n")
    print(table(rows, notes, "samples/s | peak MB (of the step)") + "\n")


def print_parts(setting: Setting, checkout: Path | None, seconds: float) -> None:
    parts = parts_of(OurStep(setting), None if checkout is None else ReferenceStep(setting, checkout))
    rows = []
    for name, (mine, other) in parts.items():
        contenders = {"ours": mine} | ({} if other is None else {"reference": other})
        found = {row.name: row for row in compare(contenders, ours="ours", seconds=seconds / len(parts), min_rounds=3)}
        peaks = {"ours": peak_megabytes(build_part, setting, name, None)[1]}
        if other is not None:
            peaks["reference"] = peak_megabytes(build_part, setting, name, checkout)[1]
        rows.append((name, found, peaks))
    total = sum(found["ours"].median for _, found, _ in rows)
    print("| part | ours, s | share | ours, MB | reference, s | reference, MB | speed-up | memory, ours to reference |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, found, peaks in rows:
        mine, other = found["ours"], found.get("reference")
        cells = [name, f"{mine.median:.3f}", f"{mine.median / total:.0%}", f"{peaks['ours']:,.0f}"]
        if other is not None and other.to_ours is not None:
            cells += [f"{other.median:.3f}", f"{peaks['reference']:,.0f}", f"{other.to_ours:.2f}"]
            cells += [f"{peaks['ours'] / peaks['reference']:.0%}"]
        print("| " + " | ".join(cells) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="a checkout of aharley/simple_bev")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="lifting/backbone")
    parser.add_argument(
        "--parts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure the parts of the first network, if it is SimpleBEV",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--image-size", default="224x400", help="height x width")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120, help="minimum duration of each network's measurement")
    parser.add_argument("--dataroot", type=Path, help="a nuScenes dataroot; the rig of its first keyframe is used")
    parser.add_argument("--split", default="mini_train")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    torch.set_num_threads(options.threads)
    dataroot = find_dataroot(options.dataroot)
    height, width = (int(n) for n in options.image_size.split("x"))
    base = Setting(
        batch=options.batch, image_size=(height, width), precision=options.precision, device=options.device, dataroot=dataroot,
        split=options.split, threads=options.threads,
    )  # fmt: skip
    rig = "a SYNTHETIC rig: no nuScenes dataroot found" if dataroot is None else "a real keyframe's rig"
    print(f"{machine()}\n{options.threads} threads" if options.device == "cpu" else torch.cuda.get_device_name())
    print(
        f"{rig}; {base.precision}, batch {base.batch}, 6 x {height}x{width}, {base.grid}, N_B {CHANNELS}, N_y {FEATURE_DIM}\n"
    )
    for number, name in enumerate(options.networks):
        lifting, backbone = name.split("/")
        setting = replace(base, network=lifting, backbone=backbone)
        print(f"### {name}\n")
        print_steps(setting, options.reference, options.seconds)
        if options.parts and number == 0 and lifting == "simplebev":
            print_parts(setting, options.reference, options.seconds)


if __name__ == "__main__":
    main()
