"""The sizes of the study, and the settings in which vehicles are learnt; pipelines/README.md has the search that found them."""

from __future__ import annotations

from dataclasses import replace

from pipelines.study.design import ARMS, FEATURES, LONGER, NONE, OCCFEAT, OCCFEAT_LONGER, OCCFEAT_RANDOM, City, Size

NETWORK = {"network.image_size": "64x112", "network.channels": "32", "network.drop_connect": "0"}
RECIPE = {"optim.lr": "3e-3"}

# What a study of three hours on two cores leaves to a GPU.
ONLY_ON_A_GPU = (LONGER, OCCFEAT_LONGER, f"{FEATURES}, random teacher", f"{OCCFEAT}, lambda 1, random teacher")

CPU = Size(
    city=City(),
    seeds=3,
    pretrain=600,
    finetune={1: 150, 10: 300},
    network=NETWORK | {"network.recompute": "false"},  # activation checkpointing saves memory that is not short here
    recipe=RECIPE,
    rate=28.0,
    machine="two cores of an AMD EPYC, 0.07 CPU seconds a sample",
    arms=tuple(arm for arm in ARMS if arm.name not in ONLY_ON_A_GPU),
)
SIZES = {
    "cpu": CPU,
    "gpu": replace(
        CPU, arms=ARMS, finetune={1: 150, 10: 300, 100: 600}, network=NETWORK, rate=500.0,
        machine="an H200", jobs=12, tasks=8,
    ),
    "demo": replace(
        CPU,
        city=City(
            train=16, tune=1, test=5, image_size=(135, 240), cached=(80, 140), feature_size=(84, 154), grid=(4, 40, 40),
            bounds=(-5, 5, -20, 20, -20, 20),
        ),
        network=CPU.network | {"network.image_size": "48x80"},
        seeds=2,
        pretrain=120,
        finetune={100: 105},
        of_task={"vehicles": {"loss.pos_weight": "8"}},  # a fortieth of the cells; more steps would do without
        curve=2,
        arms=tuple(arm for arm in ARMS if arm.name in (NONE, OCCFEAT, OCCFEAT_RANDOM)),
    ),
    "tiny": replace(  # for tests: every step, no result
        CPU, arms=ARMS, city=City(train=2, tune=1, test=1, keyframes=1, image_size=(90, 160), cached=(80, 140), feature_size=(28, 56), grid=(2, 16, 16)),
        seeds=2, pretrain=2, finetune={100: 2}, curve=2, batch=2, jobs=1,
        network={"network.image_size": "32x48", "network.channels": "8", "network.recompute": "false"},
    ),
}  # fmt: skip
