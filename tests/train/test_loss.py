from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.errors import UsageError
from ich_train.loss import label_weights, loss_sums

LOGITS = arrays(np.float32, (5, 6), elements=st.floats(-30, 30, width=32))
LABELS = arrays(np.int8, (5, 6), elements=st.integers(-1, 1))


@given(logits=LOGITS, labels=LABELS, loss=st.sampled_from(["bce", "rsna"]))
def test_sums_equal_the_formula_label_by_label(logits: np.ndarray, labels: np.ndarray, loss: str) -> None:
    sums = loss_sums(torch.from_numpy(logits), torch.from_numpy(labels), label_weights(loss, RSNA_CLASSES))
    entropy, weight, correct, known = 0.0, 0.0, 0, 0
    for line, truth in zip(logits.tolist(), labels.tolist(), strict=True):
        for j, (logit, label) in enumerate(zip(line, truth, strict=True)):
            if label < 0:
                continue
            of_label = 2.0 if loss == "rsna" and j == 5 else 1.0
            # -log of the probability given to what is true: log(1 + exp(-x)) for a positive, log(1 + exp(x)) else.
            entropy += of_label * math.log1p(math.exp(-logit if label else logit))
            weight += of_label
            correct += (logit >= 0) == (label == 1)
            known += 1
    # log(1 + exp(-9)) in float32 is off by its sum's rounding, 1e-7 at most, for each of the 30.
    assert [value.item() for value in sums] == pytest.approx([entropy, weight, correct, known], rel=1e-4, abs=3e-5)


def test_unknown_labels_have_no_gradient() -> None:
    logits = torch.zeros(1, 6, requires_grad=True)
    labels = torch.tensor([[-1, 0, 1, -1, 1, -1]], dtype=torch.int8)
    loss_sums(logits, labels, label_weights("bce", RSNA_CLASSES)).loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0.5, -0.5, 0, -0.5, 0]]


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.full((64, 6), 12.0, dtype=torch.bfloat16)
    sums = loss_sums(logits, torch.zeros(64, 6, dtype=torch.int8), label_weights("bce", RSNA_CLASSES))
    assert sums.loss.dtype == torch.float32
    assert sums.loss.item() == pytest.approx(64 * 6 * math.log1p(math.exp(12)), rel=1e-6)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected bce, rsna or package\.module:NAME"):
        label_weights("mse", RSNA_CLASSES)


def test_any_counts_twice_among_the_classes_of_rsna_only() -> None:
    assert label_weights("rsna", RSNA_CLASSES).tolist() == [1, 1, 1, 1, 1, 2]
    assert label_weights("rsna", RSNA_CLASSES[::-1]).tolist() == [2, 1, 1, 1, 1, 1]
    assert label_weights("bce", ("fracture", "any")).tolist() == [1, 1]
    with pytest.raises(UsageError, match=r"any counts twice, needs the six classes .* has fracture, any"):
        label_weights("rsna", ("fracture", "any"))
