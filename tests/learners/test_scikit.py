"""The scikit-learn face: every check of scikit-learn itself, then what users do with estimators."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from bayeslens.core.errors import InputError
from bayeslens.learners import scikit
from bayeslens.learners.linear import BayesianLinearRegression, BayesianLogisticRegression
from bayeslens.learners.scikit import ESTIMATORS, make_estimator

LINEAR = (("linear", BayesianLinearRegression()),)
LOGISTIC = (("logistic", BayesianLogisticRegression(num_members=4)),)
# Settings under which a fit takes milliseconds, or as little as the learner can.
QUICK = {
    "AutoClassifier": {"learners": LOGISTIC, "num_folds": 2},
    "AutoRegressor": {"learners": LINEAR, "num_folds": 2},
    "BayesianLinearRegressor": {},
    "BayesianLogisticClassifier": {"num_members": 4},
    "ConformalizedQuantilesRegressor": {"num_trees": 60},
    "DEUPClassifier": {"base": LOGISTIC[0][1], "error": LINEAR[0][1], "num_folds": (2,)},
    "DEUPRegressor": {"base": LINEAR[0][1], "error": LINEAR[0][1], "num_folds": (2,)},
    "DeepEnsembleClassifier": {"num_members": 1, "width": 8, "depth": 1},
    "DeepEnsembleRegressor": {"num_members": 1, "width": 8, "depth": 1},
    "GaussianProcessRegressor": {},
    "NGBoostClassifier": {"num_trees": 40, "learning_rate": 0.2},
    "NGBoostRegressor": {"num_trees": 40, "learning_rate": 0.2},
    "StackingClassifier": {"learners": (LOGISTIC[0][1],), "num_folds": 2},
    "StackingRegressor": {"learners": (LINEAR[0][1],), "num_folds": 2},
}
ALWAYS = {"BayesianLinearRegressor", "BayesianLogisticClassifier", "NGBoostClassifier", "NGBoostRegressor"}
# Learners that hold out rows or draw rows at random by position treat a row of weight 2 and two rows differently,
# as scikit-learn's own cross-validating, subsampling and early stopping estimators do.
BY_POSITION = {"Auto", "ConformalizedQuantiles", "DeepEnsemble", "NGBoost", "Stacking"}
EQUIVALENCE = "check_sample_weight_equivalence_on_dense_data"
# Hyperparameters found by iteration agree to 1e-6, and the check asks for 1e-7.
BY_ITERATION = {"GaussianProcess"}


def checks():
    for name in ESTIMATORS:
        estimator = getattr(scikit, name)(**QUICK[name])
        marks = () if name in ALWAYS else (pytest.mark.slow,)
        for number, (instance, check) in enumerate(estimator_checks_generator(estimator)):
            function = check.func.__name__
            if function == EQUIVALENCE and ESTIMATORS[name][1] in BY_POSITION | BY_ITERATION:
                continue
            yield pytest.param(instance, check, marks=marks, id=f"{name}-{function}-{number}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("estimator", "check"), list(checks()))
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


RNG = np.random.default_rng(0)
X = pd.DataFrame({"size": RNG.normal(size=120), "age": RNG.gamma(3, size=120)})
Y = 2 * X["size"] + X["age"] + RNG.normal(size=120) / 2
LABELS = np.where(Y.median() < Y, "large", "small")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_generated_from_the_fields_of_its_learner(name):
    estimator_class = getattr(scikit, name)
    module, learner, task = ESTIMATORS[name]
    learner_class = getattr(importlib.import_module(f"bayeslens.learners.{module}"), learner)
    names = list(inspect.signature(estimator_class).parameters)
    assert [*names[:-1]] == [f.name for f in dataclasses.fields(learner_class) if f.name != "task"]
    assert names[-1] == "random_state"
    assert pickle.loads(pickle.dumps(estimator_class)) is estimator_class
    assert (
        hasattr(estimator_class, "predict_proba")
        == (task == "classification")
        != hasattr(estimator_class, "predict_interval")
    )
    assert "random_state" in estimator_class.__doc__ and ">>>" not in estimator_class.__doc__
    for method in ("fit", "predict", "predict_dist"):
        assert getattr(estimator_class, method).__doc__
    with pytest.raises(TypeError):
        estimator_class(no_such_parameter=1)


def test_regressor():
    model = scikit.BayesianLinearRegressor().fit(X, Y)
    assert model.n_features_in_ == 2 and model.feature_names_in_.tolist() == ["size", "age"]
    mean, distribution = model.predict(X), model.predict_dist(X)
    np.testing.assert_allclose(mean, distribution.loc)
    interval = model.predict_interval(X, coverage=0.8)
    np.testing.assert_allclose(interval, model.predict_quantile(X, [0.1, 0.9]))
    np.testing.assert_allclose(model.predict_quantile(X, 0.5), mean)
    assert 0.7 < ((interval[:, 0] <= Y) & (interval[:, 1] >= Y)).mean() < 0.9
    assert model.score(X, Y) > 0.9
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(X), mean)
    np.testing.assert_array_equal(copy.deepcopy(model).predict(X), mean)


def test_classifier():
    model = scikit.BayesianLogisticClassifier(random_state=0).fit(X, LABELS)
    assert model.classes_.tolist() == ["large", "small"]
    probs = model.predict_proba(X)
    np.testing.assert_allclose(probs.sum(1), 1.0)
    assert (model.predict(X) == model.classes_[probs.argmax(1)]).all() and model.score(X, LABELS) > 0.8
    sets = model.predict_set(X, coverage=0.95)
    assert ((probs * sets).sum(1) >= 0.95 - 1e-6).all() and sets[np.arange(120), probs.argmax(1)].all()
    same = scikit.BayesianLogisticClassifier(random_state=0).fit(X, LABELS).predict_proba(X)
    np.testing.assert_array_equal(same, probs)


def test_deup_predicts_as_its_base_and_knows_its_excess_risk():
    base = scikit.BayesianLinearRegressor().fit(X, Y)
    model = scikit.DEUPRegressor(base=BayesianLinearRegression(), noise=0.25, random_state=0).fit(X, Y)
    np.testing.assert_allclose(model.predict(X), base.predict(X))
    np.testing.assert_allclose(model.predict_interval(X), base.predict_interval(X))
    assert (model.predictive_.excess_risk(X) >= 0).all()
    with pytest.raises(TypeError, match="base"):
        scikit.DEUPRegressor()


def test_auto_gives_conformal_sets():
    model = scikit.AutoClassifier(learners=LOGISTIC, num_folds=3, random_state=0).fit(X, LABELS)
    expected = model.predictive_.prediction_sets(model.predict_dist(X), 0.9)
    np.testing.assert_array_equal(model.predict_set(X), expected)
    regressor = scikit.AutoRegressor(learners=LINEAR, num_folds=3, random_state=0).fit(X, Y > 4)
    assert regressor.predictive_.classes is None  # the task is the class's, whatever the target looks like


def test_frames_with_text_missing_values_and_dates():
    frame = X.assign(kind=np.where(RNG.random(120) < 0.5, "a", "b"), day=pd.Timestamp("2024-01-01"))
    frame["day"] += pd.to_timedelta(np.arange(120) * 7, "D")
    frame.loc[::9, "age"] = np.nan
    model = scikit.BayesianLinearRegressor().fit(frame, Y)
    assert np.isfinite(model.predict(frame.assign(kind="new"))).all()
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["age", "size", "kind", "day"]])


def test_sample_weight():
    counts = RNG.integers(0, 3, 120)
    weighted = scikit.BayesianLinearRegressor().fit(X, Y, sample_weight=counts)
    repeated = scikit.BayesianLinearRegressor().fit(X.loc[X.index.repeat(counts)], np.repeat(Y, counts))
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), rtol=1e-6)
    # A class whose rows all have weight zero is not there.
    kept = (LABELS == "small") | (np.arange(120) < 1)
    labels = np.where(np.arange(120) < 60, "other", LABELS)
    model = scikit.BayesianLogisticClassifier().fit(X, labels, sample_weight=(labels != "other").astype(float))
    assert model.classes_.tolist() == ["large", "small"]
    with pytest.raises(InputError, match="one class only"):
        scikit.BayesianLogisticClassifier().fit(X[kept], LABELS[kept], sample_weight=LABELS[kept] == "small")


def test_in_pipelines_and_searches():
    pipeline = make_pipeline(StandardScaler(), scikit.BayesianLinearRegressor()).set_output(transform="pandas")
    pipeline.fit(X, Y)
    assert pipeline[-1].feature_names_in_.tolist() == ["size", "age"]
    assert pipeline.score(X, Y) > 0.9
    assert cross_val_score(pipeline, X, Y, cv=3).mean() > 0.8
    search = GridSearchCV(pipeline, {"bayesianlinearregressor__prior_precision": [1e-2, 1e5]}, cv=3).fit(X, Y)
    assert search.best_params_["bayesianlinearregressor__prior_precision"] == 1e-2
    search = GridSearchCV(scikit.BayesianLogisticClassifier(random_state=0), {"num_members": [2, 8]}, cv=3,
                          scoring="neg_log_loss").fit(X, LABELS)  # fmt: skip
    assert search.best_score_ > -0.4
    encoder = ColumnTransformer([("kind", OneHotEncoder(sparse_output=False), ["kind"])], remainder="passthrough")
    frame = X.assign(kind=np.where(X["size"] > 0, "a", "b"))
    model = make_pipeline(encoder, scikit.BayesianLogisticClassifier()).fit(frame, LABELS)
    assert model.predict_proba(frame).shape == (120, 2)


def test_parameters():
    model = scikit.BayesianLogisticClassifier(num_members=8)
    assert model.get_params() == {"num_members": 8, "prior_precision": None, "random_state": None}
    assert clone(model.set_params(num_members=6)).num_members == 6
    assert repr(model) == "BayesianLogisticClassifier(num_members=6)"
    with pytest.raises(ValueError, match="Invalid parameter"):
        model.set_params(trees=3)


def test_refused():
    model = scikit.BayesianLinearRegressor()
    with pytest.raises(TypeError, match="Sparse data was passed"):
        model.fit(scipy.sparse.csr_array(X.to_numpy()), Y)
    with pytest.raises(InputError, match="y to be passed"):
        model.fit(X, None)
    with pytest.raises(InputError, match="0 feature"):
        model.fit(X[[]], Y)
    with pytest.raises(InputError, match="minimum of 2"):
        model.fit(X[:1], Y[:1])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(X, Y[:50])
    with pytest.raises(InputError, match="infinity"):
        model.fit(X.assign(size=np.inf), Y)
    model.fit(X, Y)
    with pytest.raises(InputError, match="strictly between"):
        model.predict_interval(X, coverage=1.0)
    with pytest.raises(InputError, match="strictly between"):
        model.predict_quantile(X, 90)
    with pytest.raises(InputError, match="cannot do classification"):
        make_estimator(BayesianLinearRegression, "classification", "Wrong")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        scikit.Nothing  # noqa: B018
    assert set(ESTIMATORS) <= set(dir(scikit))
