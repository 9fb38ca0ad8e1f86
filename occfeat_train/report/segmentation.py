"""Pictures of a segmentation's predictions: probabilities or classes, and outcomes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps

from occfeat_targets.cache.geometry import Matrix
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.pictures.birdseye import label_colors
from occfeat_train.data.batch import Batch
from occfeat_train.report.figures import OUTCOMES, UNSCORED, Prediction, draw_map, key_of, outcome_colors
from occfeat_train.tasks.metrics import as_text
from occfeat_train.tasks.segmentation import Segmentation


def draw(task: Segmentation, batches: Sequence[Batch], poses: Sequence[Matrix]) -> list[Prediction]:
    """One prediction for each keyframe."""
    return [_draw(task, batch, pose) for batch, pose in zip(batches, poses, strict=True)]


def _draw(task: Segmentation, batch: Batch, pose: Matrix) -> Prediction:
    kind, grid, (labels, valid) = LABEL_KINDS[task.config.task], task.grid, task.labels(batch)
    logits = task.logits(batch)
    metric = task.metric()
    metric.update(logits, labels, valid)
    true, is_valid = labels[0].cpu().numpy(), valid[0, 0].cpu().numpy()
    probability = logits[0].float().sigmoid().cpu().numpy()
    predicted = (logits[0].float() >= 0).cpu().numpy()
    key = key_of(OUTCOMES)
    pictures = {}
    if len(kind.classes) == 1:
        blue = (colormaps["Blues"](probability[0])[..., :3] * 255).round().astype(np.uint8)
        pictures["probability in blue, ground truth outlined"] = draw_map(blue, grid, pose, outlined=true[0])
    else:
        key += key_of(kind.colors)
        for masks, caption in ((true, "ground truth"), (predicted, "predicted")):
            pictures[caption] = draw_map(label_colors({kind.name: masks}, grid.map_shape), grid, pose)
    for k, name in enumerate(kind.classes):
        colors = outcome_colors(predicted[k], true[k], is_valid)
        pictures[f"{name.replace('_', ' ')}, right or wrong"] = draw_map(colors, grid, pose, hatched=~is_valid)
    if not is_valid.all():
        key += key_of({f"{kind.invalid}, not scored": UNSCORED})
    return Prediction(f"IoU {as_text(metric.results()['iou'])} %", pictures, key)
