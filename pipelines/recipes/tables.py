"""The paper's tables and figures as values: for each cell, the training whose evaluation fills it and the paper's number.

The numbers are IoU [%] from the paper's text (arXiv 2404.14027). None where the paper has none, or where the text that they were
copied from cannot be read without doubt: Img-ALSO of EN-B0 on vehicles with 1 % and 10 % (Table 1) and the occupancy loss alone
on maps (Table 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from occfeat_train.presets import FINETUNED, LABELS, LAMBDAS
from pipelines.recipes.trainings import Training, training


@dataclass(frozen=True)
class Cell:
    """row, column: as in the table. training: a finetuning, whose IoU on val is the cell. paper: the paper's number [%]."""

    row: str
    column: str
    training: Training
    paper: float | None = None


@dataclass(frozen=True)
class Recipe:
    """cells: of a table or bar chart, row by row. drawn: pretrainings whose predicted features are drawn.

    corrupted: the cells are also measured on the corruptions of nuScenes-C, and compared with the first.
    """

    name: str
    title: str
    cells: tuple[Cell, ...] = ()
    drawn: tuple[Training, ...] = ()
    corrupted: bool = False

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(cell.column for cell in self.cells))

    @property
    def trainings(self) -> list[Training]:
        """Each once, after the one that it starts from."""
        found: dict[Training, None] = dict.fromkeys(self.drawn)
        for cell in self.cells:
            if cell.training.pretraining is not None:
                found[cell.training.pretraining] = None
            found[cell.training] = None
        return list(found)


NONE, ALSO, OCCFEAT, LONGER = "none", "Img-ALSO", "OccFeat", "OccFeat, 100 epochs"
_SUFFIXES = {NONE: "", ALSO: "img-also", OCCFEAT: "occfeat", LONGER: "occfeat-100ep"}
_NETWORKS = {
    "simplebev-enb0": "SimpleBEV EN-B0",
    "simplebev-rn50": "SimpleBEV RN-50",
    "bevformer-enb0": "BEVFormer EN-B0",
}
_COLUMNS = [(task, labels) for task in FINETUNED for labels in LABELS]
_TABLE1: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("simplebev-enb0", NONE): (13.7, 26.0, 37.4, 20.1, 28.1, 45.3),
    ("simplebev-enb0", ALSO): (None, None, 32.1, 23.2, 29.0, 41.1),
    ("simplebev-enb0", OCCFEAT): (24.3, 30.9, 37.7, 25.4, 33.7, 47.3),
    ("simplebev-enb0", LONGER): (24.5, 32.0, 38.1, 26.2, 34.3, 47.6),
    ("simplebev-rn50", NONE): (13.9, 28.6, 42.2, 20.1, 31.2, 44.2),
    ("simplebev-rn50", ALSO): (18.4, 25.6, 37.2, 22.3, 28.7, 41.2),
    ("simplebev-rn50", OCCFEAT): (23.5, 31.4, 41.0, 25.2, 33.6, 50.0),
    ("simplebev-rn50", LONGER): (24.8, 31.3, 41.7, 25.9, 34.4, 51.3),
    ("bevformer-enb0", NONE): (11.3, 22.8, 37.2, 20.4, 29.4, 49.6),
    ("bevformer-enb0", OCCFEAT): (24.9, 30.1, 38.8, 26.6, 36.2, 50.5),
}  # fmt: skip
# (pretraining, its image size, image size of the finetuning): vehicles with 1, 10 and 100 %
_TABLE2 = {
    (NONE, "", "224x400"): (13.7, 26.0, 37.4),
    (OCCFEAT, "224x400", "224x400"): (24.3, 30.9, 37.7),
    (LONGER, "224x400", "224x400"): (24.5, 32.0, 38.1),
    (NONE, "", "448x800"): (12.9, 28.4, 41.6),
    (OCCFEAT, "448x800", "448x800"): (26.5, 34.5, 41.5),
    (LONGER, "224x400", "448x800"): (26.1, 33.3, 41.5),
}
# (network, losses): preset, vehicles and map with 1 %
_TABLE3: dict[tuple[str, str], tuple[str, float | None, float | None]] = {
    ("simplebev-enb0", "none"): ("", 13.7, 20.1),
    ("simplebev-enb0", "occupancy"): ("table3/simplebev/occ-only", 22.8, None),
    ("simplebev-enb0", "features"): ("table3/simplebev/feat-only", 17.4, 23.4),
    ("simplebev-enb0", "both"): ("table3/simplebev/occfeat", 24.3, 25.4),
    ("bevformer-enb0", "none"): ("", 11.3, 20.4),
    ("bevformer-enb0", "occupancy"): ("table3/bevformer/occ-only", 21.9, 25.1),
    ("bevformer-enb0", "both"): ("table3/bevformer/occfeat", 24.9, 26.6),
}
_TABLE4 = dict(zip(LAMBDAS, (22.8, 22.9, 22.7, 24.3, 23.9, 19.4), strict=True))


def _column(task: str, labels: float) -> str:
    return f"{task} {labels:g} %"


def _table1() -> list[Cell]:
    return [
        Cell(
            f"{_NETWORKS[network]}, {how}",
            _column(task, labels),
            training(
                f"table1/{network}/{task}-{labels:g}", f"table1/{network}/{_SUFFIXES[how]}" if how != NONE else ""
            ),
            number,
        )
        for (network, how), numbers in _TABLE1.items()
        for (task, labels), number in zip(_COLUMNS, numbers, strict=True)
    ]


def _table2() -> list[Cell]:
    cells = []
    for (how, before, after), numbers in _TABLE2.items():
        start = f"table2/simplebev-enb0-{before}/{_SUFFIXES[how]}" if how != NONE else ""
        row = f"{after}, {how}" + (f" with {before}" if before else "")
        for labels, number in zip(LABELS, numbers, strict=True):
            finetuned = training(f"table2/simplebev-enb0-{after}/vehicles-{labels:g}", start)
            cells.append(Cell(row, _column("vehicles", labels), finetuned, number))
    return cells


def _table3() -> list[Cell]:
    return [
        Cell(f"{_NETWORKS[network]}, {losses}", _column(task, 1), training(f"table1/{network}/{task}-1", start), number)
        for (network, losses), (start, *numbers) in _TABLE3.items()
        for task, number in zip(FINETUNED, numbers, strict=True)
    ]


def _table4() -> list[Cell]:
    finetuned = "table1/simplebev-enb0/vehicles-1"
    return [
        Cell("vehicles 1 %", f"lambda {value:g}", training(finetuned, f"table4/lambda-{value:g}"), number)
        for value, number in _TABLE4.items()
    ]


def _demo() -> list[Cell]:
    return [
        Cell(how, f"{task} 100 %", training(f"small/{task}-100", start))
        for how, start in ((NONE, ""), (OCCFEAT, "small/occfeat"))
        for task in FINETUNED
    ]


_ONE_PERCENT = {_column(task, 1) for task in FINETUNED}
# Figure 1's text says only "1 % annotated data": these are the rows of Table 1 without and with OccFeat.
_FIGURE1 = [c for c in _table1() if c.column in _ONE_PERCENT and c.row.endswith((f", {NONE}", f", {OCCFEAT}"))]
_FIGURE4 = [
    replace(c, column="clean")
    for c in _table1()
    if c.row.startswith("BEVFormer") and c.column == _column("vehicles", 100)
]
_PREDICTED = (training("table1/simplebev-enb0/occfeat"),)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("fig1", "Figure 1: 1 % of the labels", tuple(_FIGURE1)),
        Recipe("table1", "Table 1: comparison of pretrainings", tuple(_table1())),
        Recipe("table2", "Table 2: image size, SimpleBEV EN-B0", tuple(_table2())),
        Recipe("table3", "Table 3: losses", tuple(_table3())),
        Recipe("table4", "Table 4: weight lambda of the feature loss, SimpleBEV EN-B0", tuple(_table4())),
        Recipe("fig4", "Figure 4: corruptions of nuScenes-C, BEVFormer EN-B0, vehicles 100 %", tuple(_FIGURE4), corrupted=True),
        Recipe("fig5", "Figure 5: predicted features as colours", drawn=_PREDICTED),
        Recipe("fig6", "Figure 6: correlation maps", drawn=_PREDICTED),
        Recipe("demo", "Demo: small networks", tuple(_demo()), drawn=(training("small/occfeat"),)),
    )
}  # fmt: skip
