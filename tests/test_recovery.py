import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.training import recovery


def test_mmcs_knows_sign_scale_and_absence(rng):
    truth = rng.normal(size=(5, 8))
    assert float(recovery.mmcs(jnp.asarray(truth), jnp.asarray(3 * truth))) == pytest.approx(1, rel=1e-5)
    basis = jnp.eye(4)
    assert float(recovery.mmcs(basis, -basis[:1])) == pytest.approx(0 * 3 / 4 - 1 / 4, abs=1e-6)
    assert float(recovery.mmcs(basis, basis[:3])) == pytest.approx(3 / 4, abs=1e-6)


def test_mmcs_of_more_true_features_than_are_looked_at_together(rng, monkeypatch):
    monkeypatch.setattr(recovery, "BLOCK", 4)
    truth, learned = rng.normal(size=(11, 5)), rng.normal(size=(7, 5))
    alive = np.array([True, False, True, True, False, True, True])
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (truth, learned)]
    cosines = unit[0] @ unit[1].T
    assert float(recovery.mmcs(truth, learned)) == pytest.approx(cosines.max(axis=1).mean(), rel=1e-6)
    assert float(recovery.mmcs(truth, learned, alive)) == pytest.approx(cosines[:, alive].max(axis=1).mean(), rel=1e-6)
    assert recovery.mcc(truth, truth[:7]) == pytest.approx(7 / 11, rel=1e-6)  # NumPy's arrays, as of a run, will do


def test_mmcs_of_live_rows_leaves_the_dead_out():
    basis = jnp.eye(4)
    assert float(recovery.mmcs(basis, basis, jnp.array([True, True, False, False]))) == pytest.approx(0.5)
    assert float(recovery.mmcs(basis, basis, jnp.zeros(4, bool))) == 0


def test_mcc_assigns_each_row_once_and_forgives_the_sign(rng):
    rows = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    order = rng.permutation(6)
    assert recovery.mcc(jnp.asarray(rows), jnp.asarray(-2 * rows[order])) == pytest.approx(1, rel=1e-5)
    assert recovery.mcc(jnp.asarray(rows), jnp.asarray(rows[[0, 0, 0]])) == pytest.approx(1 / 6, abs=1e-5)


def test_densities_count_every_live_feature_once():
    fired = np.array([0, 1, 10, 100, 1000])
    counts, edges = recovery.density_histogram(fired, 1000)
    assert counts.sum() == 4
    assert edges[0] == -3
    assert edges[-1] == 0
    assert counts[0] == 1


def f1_by_counting(values, indices, largest, instances, threshold, feature, concept):
    """One feature, one concept, token by token."""
    on = []
    for kept, which in zip(values, indices, strict=True):
        z = sum(value for value, index in zip(kept, which, strict=True) if index == feature)
        on.append(largest[feature] > 0 and z / largest[feature] > threshold)
    labels = instances[:, concept]
    n_on = sum(on)
    hits = sum(1 for flag, label in zip(on, labels, strict=True) if flag and label >= 0)
    every = {label for label in labels if label >= 0}
    found = {label for flag, label in zip(on, labels, strict=True) if flag and label >= 0}
    precision, recall = (hits / n_on if n_on else 0), (len(found) / len(every) if every else 0)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0


def test_thresholds_are_those_of_interplm():
    assert recovery.THRESHOLDS == (0, 0.15, 0.5, 0.6, 0.8)


def annotated(rng, n_tokens=120, n=9, k=3):
    """Feature 0 is dead and feature 1 kept at 0; a concept of runs, one of single tokens, one that is nowhere."""
    scores = rng.random((n_tokens, n)) * rng.random(n)
    scores[:, 0] = -1
    indices = np.argsort(-scores, axis=1)[:, :k]
    values = np.maximum(np.take_along_axis(scores, indices, axis=1), 0)
    values[indices == 1] = 0
    runs = np.where(np.arange(n_tokens) % 12 < 5, np.arange(n_tokens) // 12, -1)
    single = np.where(rng.random(n_tokens) < 0.3, np.arange(n_tokens), -1)
    largest = np.zeros(n)
    np.maximum.at(largest, indices, values)
    return values, indices, largest, np.stack([runs, single, np.full(n_tokens, -1)], axis=1)


def test_concept_f1_is_that_of_counting_token_by_token(rng):
    values, indices, largest, instances = annotated(rng)
    found = recovery.concept_f1(values, indices, largest, instances)
    assert found.shape == (5, 9, 3)
    for t, threshold in enumerate(recovery.THRESHOLDS):
        for feature in range(9):
            for concept in range(3):
                expected = f1_by_counting(values, indices, largest, instances, threshold, feature, concept)
                assert found[t, feature, concept] == pytest.approx(expected, abs=1e-12)
    assert not found[:, :2].any()  # never on
    assert not found[:, :, 2].any()  # nowhere
    assert (found[:, 2:, :2] > 0).any(axis=(0, 1)).all()


def test_concepts_do_not_hang_on_the_scale_of_a_feature_and_one_token_finds_an_instance(rng):
    values, indices, largest, instances = annotated(rng)
    scale = rng.uniform(0.1, 100, len(largest))
    again = recovery.concept_f1(values * scale[indices], indices, largest * scale, instances)
    np.testing.assert_allclose(again, recovery.concept_f1(values, indices, largest, instances), atol=1e-12)
    once = np.array([[1.0], [0.0], [0.0], [0.0]])
    whole, apart = np.array([[0], [0], [0], [-1]]), np.array([[0], [1], [2], [-1]])
    nowhere = np.zeros((4, 1), int)
    assert recovery.concept_f1(once, nowhere, np.ones(1), whole)[0, 0, 0] == 1
    assert recovery.concept_f1(once, nowhere, np.ones(1), apart)[0, 0, 0] == pytest.approx(2 * (1 / 3) / (4 / 3))


def test_the_test_tokens_have_no_part_in_the_choice_of_detector(rng):
    validation, test = rng.random((5, 7, 4)), rng.random((5, 7, 4))
    found = recovery.best_detectors(validation, test)
    for c in range(4):
        t, feature = np.argwhere(validation[:, :, c] == validation[:, :, c].max())[0]
        assert (found.feature[c], found.threshold[c]) == (feature, recovery.THRESHOLDS[t])
        assert (found.validation[c], found.test[c]) == (validation[t, feature, c], test[t, feature, c])
    assert (found.test < test.max(axis=(0, 1))).any()
