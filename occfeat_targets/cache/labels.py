"""The kinds of labels that a cache can hold: one row of `LABEL_KINDS` each, in the order of the cache's arrays.

A row names the kind's code as "module:function", for `pkgutil.resolve_name`, so that the trainer can read the table
without the libraries that draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class LabelKind:
    """One kind of bird's-eye labels: binary masks of some classes on the grid's plane.

    name: as in ``--label-kinds`` and ``--task``, and of the array ``labels/<name>``.
    classes: names of the K classes, in the order of the masks. An array of one class has no class axis.
    colors: colour of each class, in drawing order (later ones cover earlier ones).
    draw: function that draws the masks of a keyframe, a `Draw` of `targets/labels.py`.
    reference: its slow, independent reference for `verify`, a `Reference` of `verify/slow_labels.py`.
    needs: what the data set must have, some of ``annotations`` and ``maps``.
    invalid: which cells are not valid, if the kind has a validity mask, the array ``labels/<name>_valid``. Cells that are
    not valid count neither in the loss nor in the IoU.
    is_solid: the classes are objects that LiDAR hits, so their cells must coincide with occupied voxels.
    instances, instances_reference: functions that draw the kind's single objects, a `DrawInstances` of `targets/instances.py`,
    and their slow reference, if the kind has any.
    expected: a class that surrounds the ego vehicle in every scene, if there is one. A build warns of scenes without it.
    description: of the array ``labels/<name>``.
    """

    name: str
    classes: tuple[str, ...]
    colors: Mapping[str, RGB]
    draw: str
    reference: str
    description: str
    needs: tuple[str, ...] = ()
    invalid: str | None = None
    is_solid: bool = False
    expected: str | None = None
    instances: str | None = None
    instances_reference: str | None = None

    def __post_init__(self) -> None:
        if set(self.colors) != set(self.classes):
            raise ValueError(
                f"label kind {self.name} has classes {self.classes} and colours of {tuple(self.colors)}: "
                "expected one colour for each class"
            )

    @property
    def class_shape(self) -> tuple[int, ...]:
        """Class axis of the array of masks: () for one class, (K,) for more."""
        return () if len(self.classes) == 1 else (len(self.classes),)

    @property
    def array(self) -> str:
        """Name of the array of masks, [N, F, *class_shape, H, W/8] bits."""
        return f"labels/{self.name}"

    @property
    def valid_array(self) -> str | None:
        """Name of the array of validity masks, [N, F, H, W/8] bits, or None if every cell is valid."""
        return None if self.invalid is None else f"labels/{self.name}_valid"

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays of this kind."""
        return (self.array,) if self.valid_array is None else (self.array, self.valid_array)

    @property
    def center_array(self) -> str:
        """Name of the array of squared distances to the nearest centre of an object, [N, F, H, W], in caches with instances."""
        return f"labels/{self.name}_center"

    @property
    def offset_array(self) -> str:
        """Name of the array of offsets from the centre of a cell's own object, [N, F, 2, H, W], in caches with instances."""
        return f"labels/{self.name}_offset"


# The paper names these five classes. They are BEVFusion's six without stop_line.
MAP_CLASSES = ("road", "sidewalk", "crosswalk", "parking_area", "road_divider")

LABEL_KINDS: dict[str, LabelKind] = {
    kind.name: kind
    for kind in (
        LabelKind(
            name="vehicles",
            classes=("vehicles",),
            colors={"vehicles": (216, 88, 20)},
            draw="occfeat_targets.targets.labels:vehicle_labels",
            reference="occfeat_targets.verify.slow_labels:vehicle_reference",
            description="vehicle cells",
            needs=("annotations",),
            invalid="hardly visible vehicle",
            is_solid=True,
            instances="occfeat_targets.targets.instances:vehicle_instances",
            instances_reference="occfeat_targets.verify.slow_instances:vehicle_instances_reference",
        ),
        LabelKind(
            name="map",
            classes=MAP_CLASSES,
            colors={
                "road": (176, 178, 190),
                "parking_area": (70, 130, 240),
                "sidewalk": (136, 64, 150),
                "crosswalk": (250, 226, 50),
                "road_divider": (30, 30, 34),
            },
            draw="occfeat_targets.targets.labels:map_labels",
            reference="occfeat_targets.verify.slow_labels:map_reference",
            description="map cells; classes: " + ", ".join(MAP_CLASSES),
            needs=("maps",),
            expected="road",
        ),
    )
}
