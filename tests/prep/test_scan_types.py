"""Scan types and body parts by the words of many sites."""

from __future__ import annotations

import pytest

from ich_prep.layouts.cq500 import _is_excluded
from ich_prep.layouts.scan_types import is_not_head, scan_type_of

WORDS = {
    "plain": "CT Plain|CT PLAIN THIN|CT Thin Plain|CT 55mm Plain|CT Plain 3mm|CT PRE CONTRAST 5MM STD|CT Plain-2|HEAD W/O|"
    "HEAD WO CONTRAST|NON CONTRAST BRAIN|Schädel nativ|Kopf ohne KM|CRANE SANS INJECTION|CRANEO SIN CONTRASTE|CEREBRO S/C|"
    "HEAD C-|HEAD -C|unenhanced head|NCCT|Head Without Contrast|HEAD NON-CON|non_contrast_head",
    "contrast": "CT POST CONTRAST-2|CT C|CT C THIN|CT C-2|CT CECT THIN|CT Plain +C|CT ORAL IV|CT 1.25 MMC|CT 1.25 MMC-3|"
    "BRAIN W/ CONTRAST|Schädel mit KM|CRANE AVEC INJECTION|CEREBRO C/C|HEAD C+|CTA HEAD|post IV|AXIAL C|"
    "with and without contrast|HEAD WITHOUT & WITH|Post contrast bone|5MM C|ANGIO_HEAD",
    "bone": "CT BONE|CT BONE-3|CT HRCT|Knochen|HEAD_BONE_H60|OSSEUX|BONE PLAIN",
    "unknown": "CT 5mm|CT 0.625mm|STD BRAIN 5MM|POST OP HEAD|POST FOSSA 2.5|C-SPINE|ROUTINE C SPINE|C2-C4|"
    "Axial 5.0 H31s||C-ARM",
}
CASES = [(kind, text) for kind, texts in WORDS.items() for text in texts.split("|")]


@pytest.mark.parametrize(("kind", "text"), CASES)
def test_the_words_of_a_description_or_a_folder_decide(kind: str, text: str) -> None:
    assert scan_type_of(text, None, None, None) == (kind, False)
    assert scan_type_of(None, text, "H30s", "NONE") == (kind, False)
    assert scan_type_of("HEAD 5MM", text, None, "Omnipaque 350") == (kind, True)


def test_the_description_comes_before_the_folder_and_both_before_the_kernel() -> None:
    assert scan_type_of("plain", "CT BONE", "H70h", "x")[0] == "plain"
    assert scan_type_of(None, "CT Plain", "H70h", None)[0] == "plain"
    for kernel in ("H70h", "BONE", "BONEPLUS", "FC30", "Hr69f\\3", "LUNG", "B60s"):
        assert scan_type_of("HEAD", None, kernel, "Ultravist") == ("bone", True)
    for kernel in ("H30s", "STANDARD", "FC21", "UB", "Hr40", "J40s\\2", "", None):
        assert scan_type_of("HEAD", None, kernel, "Ultravist") == ("unknown", True)


@pytest.mark.parametrize("agent", [None, "", "NONE", "No", "without", "0", " ohne KM"])
def test_the_absence_of_an_agent_is_not_stated_contrast(agent: str | None) -> None:
    assert scan_type_of(None, None, None, agent) == ("unknown", False)


@pytest.mark.parametrize("name", ["CT 4cc sec 150cc D3D on-2", "CT 3D CT HEADORBIT", "CT C-2", "CT BONE", "CT ORAL IV"])
def test_cq500_excludes_renderings_contrast_and_bone(name: str) -> None:
    assert _is_excluded(name)


@pytest.mark.parametrize("name", ["CT Plain", "CT 5mm", "CT 0.625mm", "CT PRE CONTRAST 5MM STD", "CT I To S"])
def test_cq500_keeps_the_rest(name: str) -> None:
    assert not _is_excluded(name)


HEADS = "HEAD|BRAIN|SKULL|ORBIT|IAC|SINUS|FACE|HEADNECK|HEAD_NECK|Kopf|EAR|TEMPORAL BONE|SCHÄDEL|CRANEO|CRÂNE|TÊTE|"
HEADS += "PITUITARY|HIPPOCAMPUS|CEREBELLUM|HEAD AND C-SPINE|ROUTINE|UNKNOWN||CAP"
OTHERS = "NECK|CSPINE|C_SPINE|CHEST|HEART|THORAX|ABDOMEN|FEMORAL HEAD|HUMERAL HEAD|LSPINE|WHOLEBODY|WHOLE BODY|HIP|"
OTHERS += "PELVIS|KNEE|EXTREMITY|CHEST_TO_PELVIS|BECKEN|COLUMNA|LWS|HÜFTE"


@pytest.mark.parametrize("part", HEADS.split("|"))
def test_heads_and_unknown_parts(part: str) -> None:
    assert not is_not_head(part, None)
    assert not is_not_head(part, 350.0)
    assert is_not_head(part, 350.1)


@pytest.mark.parametrize("part", OTHERS.split("|"))
def test_other_parts(part: str) -> None:
    assert is_not_head(part, 240.0)
