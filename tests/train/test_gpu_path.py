"""The GPU path of a training step, run by Triton's interpreter: a step with all kernels against a step without.

The precision is float16, because the interpreter cannot multiply bfloat16.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from occfeat_train.config import LIFTINGS
from occfeat_train.ops import deformable, instance_norm, mean_over_views, mirror
from occfeat_train.tasks import heads
from tests.train.interpreted import LIFTING, interpreted
from tests.train.test_batch import make_batch
from tests.train.test_tasks import CONFIG, task_of

pytest.importorskip("triton", reason="no Triton for this platform")
KERNELS = [
    LIFTING,
    *(
        f"occfeat_train.ops.{name}"
        for name in ("instance_norm_triton", "head_triton", "deformable_triton", "mirror_triton")
    ),
]


def loss_and_gradients(name: str, *, with_kernels: bool) -> tuple[float, dict[str, Tensor], set[torch.dtype]]:
    task = task_of(network=dataclasses.replace(CONFIG.network, lifting=name)).train()
    for module in task.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    dtypes: set[torch.dtype] = set()
    for module in task.modules():
        if isinstance(module, instance_norm.InstanceNorm):
            module.register_forward_hook(lambda module, given, out: dtypes.add(out.dtype))
    with contextlib.ExitStack() as stack:
        if with_kernels:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for module in (instance_norm, heads, deformable, mean_over_views, mirror):
                patch.setattr(module, "runs_triton", lambda device: True)
            for kernels in KERNELS:
                stack.enter_context(interpreted(kernels))
        with torch.autocast("cpu", torch.float16):
            loss = task(make_batch(2))["loss"]
        loss.backward()
    return loss.item(), {n: p.grad for n, p in task.named_parameters() if p.requires_grad}, dtypes


@pytest.mark.slow
@pytest.mark.parametrize("name", LIFTINGS)
def test_a_half_precision_step_with_all_kernels_equals_one_without(name: str) -> None:
    loss, gradients, dtypes = loss_and_gradients(name, with_kernels=True)
    plain_loss, plain, _ = loss_and_gradients(name, with_kernels=False)
    assert dtypes == {torch.float16}
    assert loss == pytest.approx(plain_loss, rel=2e-2)
    ours, theirs = (torch.cat([g[n].flatten() for n in sorted(plain)]) for g in (gradients, plain))
    assert ours.isfinite().all()
    # the two steps round differently, so only the directions agree
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98
