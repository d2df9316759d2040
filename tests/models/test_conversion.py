"""Perceptrons of scikit-learn and PyTorch as dense networks: the same function."""

import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import nn

from hf_compress.models import from_scikit_learn, from_sequential
from hf_compress.storage.save import save
from tests.helpers.ffns import noise

X, Y = load_iris(return_X_y=True)


def fitted(network, targets=Y):
    network.max_iter = 3
    with pytest.warns(UserWarning, match="reached"):
        return network.fit(X, targets)


@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic", "identity"])
@pytest.mark.parametrize("layers", [(7,), (5, 9, 3)])
@pytest.mark.parametrize("classes", [2, 3])
def test_classifiers_give_the_same_probabilities(activation, layers, classes):
    network = fitted(MLPClassifier(layers, activation=activation, random_state=0), Y % classes)
    model = from_scikit_learn(network)
    with torch.no_grad():
        got = model(torch.tensor(X, dtype=torch.float32)).logits.softmax(-1)
    assert torch.allclose(got.double(), torch.tensor(network.predict_proba(X)), atol=1e-5)
    assert model.config.intermediate_size == list(layers)


def test_regressors_give_the_same_values():
    network = fitted(
        MLPRegressor(hidden_layer_sizes=(6, 4), random_state=0), X @ [[1.0, 0], [0, 2.0], [1.0, 1.0], [0, 0]]
    )
    model = from_scikit_learn(network)
    with torch.no_grad():
        got = model(torch.tensor(X, dtype=torch.float32)).logits
    assert torch.allclose(got.double(), torch.tensor(network.predict(X)), atol=1e-4)
    assert model.config.problem_type == "regression"


def test_a_sequential_is_the_same_function_and_can_be_saved(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 9), nn.SiLU(), nn.Dropout(0.5), nn.Linear(9, 5, bias=False), nn.SiLU(), nn.Linear(5, 3)]
    network = nn.Sequential(*layers).eval()
    model = from_sequential(network)
    x = noise(6, 4)
    with torch.no_grad():
        assert torch.allclose(model(x).logits, network(x), atol=1e-6)
        loaded = type(model).from_pretrained(save(model, tmp_path / "saved"))
        assert torch.equal(loaded(x).logits, model(x).logits)


def test_refuses_what_is_no_perceptron():
    with pytest.raises(TypeError, match="MLPClassifier or MLPRegressor; got LogisticRegression"):
        from_scikit_learn(LogisticRegression())
    with pytest.raises(ValueError, match="not fitted yet"):
        from_scikit_learn(MLPClassifier())
    several = fitted(MLPClassifier((4,), random_state=0), (Y[:, None] == [0, 1, 2]).astype(int))
    with pytest.raises(ValueError, match="several labels at once"):
        from_scikit_learn(several)
    relu, linear = nn.ReLU(), nn.Linear(4, 4)
    for wrong in ([linear], [linear, relu], [linear, relu, relu], [linear, relu, linear, nn.Tanh(), linear], []):
        with pytest.raises(ValueError, match="expected"):
            from_sequential(nn.Sequential(*wrong))
