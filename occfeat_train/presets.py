"""Presets: one for every row of the paper's tables that this release can train, larger ones, and scaled-down ones.

``simple-bev/...`` is the protocol of aharley/simple_bev, for comparisons with its published numbers.

Pretraining presets are named after the row (``table1/simplebev-enb0/occfeat``), finetuning presets after the row's
network and the column (``table1/simplebev-enb0/vehicles-1``). The finetuning recipe is the same with and without
pretraining (``--from``; paper 4.1).
"""

from __future__ import annotations

from dataclasses import replace

from occfeat_targets.common.suggest import did_you_mean
from occfeat_train.config import PRETEXTS, Config, LossConfig, NetworkConfig, OptimConfig

# Paper 4.1: labels [%] -> epochs / learning rate / batch / accumulation.
FINETUNING: dict[float, OptimConfig] = {
    labels: OptimConfig("adamw", "onecycle", lr=lr, epochs=epochs, batch=batch, accumulation=accumulation)
    for labels, epochs, lr, batch, accumulation in ((1, 100, 1e-4, 6, 1), (10, 50, 1e-4, 6, 1), (100, 30, 3e-4, 8, 5))
}
LABELS = tuple(FINETUNING)
FINETUNED = ("vehicles", "map")  # the tasks of the paper's tables
# Paper 4.4, Table 4.
LAMBDAS = (0, 0.0001, 0.001, 0.01, 0.1, 1.0)
OCC_ONLY = LossConfig(feat=0.0)
# Adam is nearly invariant to the weight of a single loss; 1 is eq. 3 itself.
FEAT_ONLY = LossConfig(occ=0.0, feat=1.0)

_NETWORKS = {
    "simplebev-enb0": NetworkConfig(),
    "simplebev-rn50": NetworkConfig(backbone="resnet-50"),
    "bevformer-enb0": NetworkConfig(lifting="bevformer"),
    "simplebev-enb0-448x800": NetworkConfig(image_size=(448, 800)),
}
_SMALL = NetworkConfig(weights="none", channels=32, image_size=(64, 112))

# train_nuscenes.py: 25,000 steps of 5 x 8 samples are 35.55 epochs of 28,130 keyframes.
_SIMPLE_BEV_OPTIM = OptimConfig(
    "adamw", "onecycle", lr=3e-4, epochs=35.55, batch=8, accumulation=5, accumulate="sum", schedule_tail=100
)


def simple_bev(network: NetworkConfig) -> Config:
    """Simple-BEV's protocol: grids in camera frames, three heads with its losses, its recipe, and its liftings' defects."""
    network = replace(network, compat="simple-bev")
    loss = LossConfig(heads="simple-bev")
    return Config("vehicles", network, optim=_SIMPLE_BEV_OPTIM, loss=loss, frame="cameras", precision="float32")


def finetuning(task: str, labels: float, network: NetworkConfig) -> Config:
    """The paper's recipe for a label fraction [%]; for other fractions, the recipe of the next larger one."""
    recipe = FINETUNING[min(p for p in LABELS if p >= labels)]
    return Config(task, network, optim=recipe, labels=labels)


def _presets() -> dict[str, Config]:
    presets = {}
    for name in ("simplebev-enb0", "simplebev-rn50", "bevformer-enb0"):
        row = Config(network=_NETWORKS[name])
        presets[f"table1/{name}/occfeat"] = row
        if name != "bevformer-enb0":  # the paper has only OccFeat, for 50 epochs
            presets[f"table1/{name}/occfeat-100ep"] = replace(row, optim=replace(row.optim, epochs=100.0))
            # The paper does not state the baseline's optimiser and length: OccFeat's, for a fair comparison.
            presets[f"table1/{name}/img-also"] = replace(row, task="img-also")
        for task in FINETUNED:
            for labels in LABELS:
                presets[f"table1/{name}/{task}-{labels:g}"] = finetuning(task, labels, _NETWORKS[name])
    for pixels in ("224x400", "448x800"):
        network = _NETWORKS["simplebev-enb0" if pixels == "224x400" else "simplebev-enb0-448x800"]
        presets[f"table2/simplebev-enb0-{pixels}/occfeat"] = row = Config(network=network)
        if pixels == "224x400":  # finetuned with both sizes
            presets[f"table2/simplebev-enb0-{pixels}/occfeat-100ep"] = replace(
                row, optim=replace(row.optim, epochs=100.0)
            )
        for labels in LABELS:
            presets[f"table2/simplebev-enb0-{pixels}/vehicles-{labels:g}"] = finetuning("vehicles", labels, network)
    presets["table3/simplebev/occ-only"] = Config(loss=OCC_ONLY)
    presets["table3/simplebev/feat-only"] = Config(loss=FEAT_ONLY)
    presets["table3/simplebev/occfeat"] = Config()
    presets["table3/bevformer/occ-only"] = Config(network=_NETWORKS["bevformer-enb0"], loss=OCC_ONLY)
    presets["table3/bevformer/occfeat"] = Config(network=_NETWORKS["bevformer-enb0"])
    for value in LAMBDAS:
        presets[f"table4/lambda-{value:g}"] = Config(loss=LossConfig(feat=float(value)))
    # The paper's perspectives (5): a larger teacher, image encoder and BEV decoder. It gives no sizes: these are ours.
    for letter, teacher in (("b", "base"), ("l", "large"), ("g", "giant")):
        presets[f"scale/teacher-vit{letter}"] = Config(teacher=f"facebook/dinov2-{teacher}")
    presets["scale/student-rn101"] = Config(network=NetworkConfig(backbone="resnet-101"))
    presets["scale/wide-decoder"] = Config(network=NetworkConfig(channels=256))
    for lifting in ("simplebev", "bevformer"):
        for encoder, backbone in (("rn101", "resnet-101"), ("enb0", "efficientnet-b0")):
            for suffix, size in (("", (224, 400)), ("-448x800", (448, 800))):
                network = NetworkConfig(lifting, backbone, image_size=size)  # type: ignore[arg-type]
                presets[f"simple-bev/{lifting}-{encoder}{suffix}"] = simple_bev(network)
    # Smaller images, fewer channels, fewer epochs, no pretrained backbone: for two cores and the synthetic city.
    for task in PRETEXTS:
        presets[f"small/{task}"] = Config(task, _SMALL, optim=OptimConfig(batch=8, epochs=4))
    for task in FINETUNED:
        for labels, epochs in ((1, 24), (10, 8), (100, 1.5)):
            short = OptimConfig("adamw", "onecycle", lr=1e-3, epochs=epochs, batch=4)
            presets[f"small/{task}-{labels}"] = replace(finetuning(task, labels, _SMALL), optim=short)
    short = OptimConfig(
        "adamw", "onecycle", lr=1e-3, epochs=1.5, batch=4, accumulation=2, accumulate="sum", schedule_tail=4
    )
    presets["small/simple-bev"] = replace(simple_bev(_SMALL), optim=short)
    return presets


PRESETS = _presets()


def preset(name: str) -> Config:
    """Raises ValueError that names those that resemble it, or all."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}" + (did_you_mean(name, PRESETS) or f"; there are: {', '.join(PRESETS)}"))
    return PRESETS[name]
