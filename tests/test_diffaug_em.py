"""DiffAugEM: the phases of Algorithm 1, the ablations, frozen parts, and what it learns."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

import diffaugkit
from diffaugkit import (
    DiffAugEM,
    EmbeddingConditionedDiffusion,
    SelfSupervisedEncoder,
    embedding_diffusion,
)
from diffaugkit.metrics import knn_accuracy
from diffaugkit.rows import BackedRows

CONDITIONS = ("embedding", "projection", "supervised", "random")


def tiny_encoder(**more):
    tiny = {"hidden_sizes": (8,), "n_components": 4, "n_pcs": 6}
    return SelfSupervisedEncoder(**{**tiny, **more})


def tiny_diffusion(**more):
    tiny = {"width": 8, "n_blocks": 1, "n_pcs": 6, "n_sampling_steps": 2}
    return EmbeddingConditionedDiffusion(**{**tiny, **more})


def tiny(**more):
    parts = {"encoder": tiny_encoder(), "diffusion": tiny_diffusion()}
    return DiffAugEM(**{**parts, "schedule": (2, 1, 2), "random_state": 0, **more})


def phases(model):
    table = model.history_
    return [
        (phase, int(number), len(group))
        for (number, phase), group in table.groupby(["round", "phase"], sort=False)
    ]


# ---- schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ((3,), [("E", 0, 3)]),
        ((2, 1, 2), [("E", 0, 2), ("M", 0, 1), ("E", 1, 2)]),
        ([2, 0, 2], [("E", 0, 2), ("E", 1, 2)]),
        ((1, 2, 0), [("E", 0, 1), ("M", 0, 2)]),
        (
            (2, 1, 2, 1, np.int64(2)),
            [("E", 0, 2), ("M", 0, 1), ("E", 1, 2), ("M", 1, 1), ("E", 2, 2)],
        ),
    ],
)
def test_phases(blobs, schedule, expected):
    X = blobs[0]
    model = tiny(schedule=schedule).fit(X)
    assert phases(model) == expected
    assert list(model.history_.columns[:4]) == ["phase", "round", "epoch", "loss"]
    assert model.n_iter_ == sum(schedule)
    assert model.transform(X).shape == (240, 4)
    assert model.project(X).shape == (240, 2)
    if any(phase == "M" for phase, *_ in expected):
        assert model.augment(X, 2).shape == (480, 20)
        assert model.quality_report(X, blobs[1]).copy_ratio > 0
    else:
        assert model.diffusion_ is None
        for call in (model.augment, model.quality_report):
            with pytest.raises(ValueError, match="give schedule an M-step"):
                call(X)


@pytest.mark.parametrize("schedule", [(), (1, 2), (0, 1, 1), (1, -1, 1), (1.5,), ("a",)])
def test_bad_schedules_are_refused(blobs, schedule):
    with pytest.raises(ValueError, match="odd number of phases"):
        tiny(schedule=schedule).fit(blobs[0])


def test_auto_schedule_is_the_papers_and_shorter_on_large_data():
    model, encoder = DiffAugEM(), SelfSupervisedEncoder(batch_size=300)
    assert model._schedule(encoder, 600) == (330, 330, 340)
    assert model._schedule(encoder, 10) == (330, 330, 340)
    short = model._schedule(encoder, 300_000)
    assert len(short) == 3
    assert 5 <= min(short) <= max(short) <= 10


def test_e_steps_alone_are_the_encoder_by_itself(blobs):
    X = blobs[0]
    model = tiny(schedule=(4,)).fit(X)
    alone = clone(model.encoder_).set_params(max_epochs=4).fit(X)
    np.testing.assert_array_equal(alone.transform(X), model.transform(X))


def test_one_run_is_the_algorithm_written_out(blobs):
    X = blobs[0]
    model = tiny(schedule=(2, 3, 2), augmentation_prob=0.8, n_views=2).fit(X)
    encoder = clone(model.encoder_).set_params(max_epochs=2, warm_start=True).fit(X)
    diffusion = clone(model.diffusion_).fit(X, embeddings=encoder.transform(X))
    y = encoder.transform(X)
    seed = diffaugkit.runtime.mix_seed(0, 1)
    views = list(diffusion._views(y, 2, seed))
    assert not np.array_equal(np.asarray(views[0]), np.asarray(views[1]))
    encoder.fit(X, positives=[np.asarray(view) for view in views])
    # Generated views cross the gate once more here, hence rounding.
    np.testing.assert_allclose(encoder.transform(X), model.transform(X), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(
        diffusion.sample(y[:5]), model.diffusion_.sample(y[:5]), rtol=1e-3, atol=1e-4
    )


def test_generated_views_reach_the_encoder(blobs):
    X = blobs[0]
    with_views, without, many = (
        tiny(augmentation_prob=p, n_views=n).fit(X).transform(X)
        for p, n in ((1.0, 1), (0.0, 1), (1.0, 3))
    )
    assert not np.array_equal(with_views, without)
    assert not np.array_equal(with_views, many)
    no_m = tiny(schedule=(2, 0, 2)).fit(X).transform(X)
    np.testing.assert_array_equal(without.shape, no_m.shape)


@pytest.mark.parametrize(
    ("share", "epochs", "n_views"),
    [(0.1, 10, 1), (0.1, 25, 2), (0.5, 3, 2), (1.0, 9, 4), (0, 9, 1)],
)
def test_no_more_views_are_made_than_are_looked_at(blobs, monkeypatch, share, epochs, n_views):
    made, views = [], EmbeddingConditionedDiffusion._views

    def record(self, embeddings, n_views, seed):
        made.append(n_views)
        return views(self, embeddings, n_views, seed)

    monkeypatch.setattr(EmbeddingConditionedDiffusion, "_views", record)
    tiny(schedule=(1, 1, epochs), n_views=4, augmentation_prob=share).fit(blobs[0])
    assert made == [n_views]


@pytest.mark.parametrize(
    ("schedule", "made"),
    [
        ((1, 1, 0), []),
        ((1, 1, 0, 0, 4), [4]),
        ((1, 1, 0, 1, 2), [2]),
        ((1, 1, 3, 1, 0), [3]),
    ],
)
def test_views_are_made_for_the_next_e_step_that_runs(blobs, monkeypatch, schedule, made):
    found, views = [], EmbeddingConditionedDiffusion._views

    def record(self, embeddings, n_views, seed):
        found.append(n_views)
        return views(self, embeddings, n_views, seed)

    monkeypatch.setattr(EmbeddingConditionedDiffusion, "_views", record)
    tiny(schedule=schedule, n_views=4, augmentation_prob=1.0).fit(blobs[0])
    assert found == made


def test_the_buffer_is_drawn_anew_at_each_switch(blobs, monkeypatch):
    drawn, used = [], []
    views, fit = EmbeddingConditionedDiffusion._views, SelfSupervisedEncoder.fit

    def record_views(self, embeddings, n_views, seed):
        drawn.append((embeddings.copy(), n_views, seed))
        return views(self, embeddings, n_views, seed)

    def record_fit(self, X, y=None, *, positives=None):
        used.append(None if positives is None else np.asarray(positives[0]))
        return fit(self, X, y, positives=positives)

    monkeypatch.setattr(EmbeddingConditionedDiffusion, "_views", record_views)
    monkeypatch.setattr(SelfSupervisedEncoder, "fit", record_fit)
    tiny(schedule=(2, 1, 2, 1, 2), n_views=2, augmentation_prob=1.0).fit(blobs[0])
    assert used[0] is None
    assert not np.array_equal(used[1], used[2])
    (first, n_first, seed_first), (second, n_second, seed_second) = drawn
    assert n_first == n_second == 2
    assert seed_first != seed_second
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("condition", ["embedding", "projection"])
def test_the_generator_listens_to_the_encoder_that_taught_it(blobs, condition, tmp_path):
    X = blobs[0]
    parts = {"encoder": tiny_encoder(learning_rate=0.05), "condition": condition}
    ends_with_m, model = (tiny(schedule=(2, 1, n), **parts).fit(X) for n in (0, 3))
    assert not np.array_equal(model.transform(X), ends_with_m.transform(X))
    np.testing.assert_array_equal(model.augment(X), ends_with_m.augment(X))
    assert model.quality_report(X) == ends_with_m.quality_report(X)
    taught = model.condition_encoder_
    np.testing.assert_array_equal(taught.transform(X), ends_with_m.transform(X))
    assert not taught.warm_start
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(diffaugkit.load(tmp_path / "model").augment(X), model.augment(X))


# ---- ablations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(blobs, condition, joint):
    X, labels = blobs
    model = tiny(condition=condition, joint=joint)
    names = np.array(["b", "a", "c"])[labels]
    if condition == "supervised":
        with pytest.raises(ValueError, match="needs labels"):
            model.fit(X)
        with pytest.raises(ValueError, match="inconsistent"):
            model.fit(X, names[1:])
        with pytest.raises(ValueError, match=r"missing labels .* in rows 3:"):
            model.fit(X, np.where(np.arange(len(X)) == 3, np.nan, labels))
    model.fit(X, names)
    width = {"embedding": 4, "projection": 2, "supervised": 3, "random": 4}[condition]
    assert len(model.diffusion_._condition["mean"]) == width
    assert model.diffusion_.sample(np.zeros((2, width))).shape == (2, 20)
    assert model.diffusion_.sample(3).shape == (3, 20)
    again = clone(model).fit(X, names)
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    if condition == "supervised":
        with pytest.raises(ValueError, match="one-hot"):
            model.augment(X)
    else:
        samples = model.augment(X, strength=0.7)
        assert np.isfinite(samples).all()
        np.testing.assert_array_equal(model.augment(X[:9], strength=0.7), samples[:9])
        np.testing.assert_array_equal(again.augment(X, strength=0.7), samples)


@pytest.mark.parametrize("schedule", [(2,), (2, 1, 2), (2, 0, 1), (1, 1, 1, 1, 1)])
def test_joint_training(blobs, schedule, tmp_path):
    X = blobs[0]
    model = tiny(joint=True, schedule=schedule).fit(pd.DataFrame(X).rename(columns=str))
    assert set(model.history_["phase"]) == {"EM"}
    assert model.n_iter_ == sum(schedule)
    assert {"e_loss", "m_loss"} <= set(model.history_.columns)
    total = model.history_["e_loss"] + model.history_["m_loss"]
    np.testing.assert_allclose(total, model.history_["loss"], rtol=1e-5)
    for part in (model.encoder_, model.diffusion_):
        assert part.n_features_in_ == 20
        assert list(part.feature_names_in_) == [str(i) for i in range(20)]
    # Rows to draw from: embeddings of the encoder as it is at the end.
    frame = pd.DataFrame(X).rename(columns=str)
    np.testing.assert_array_equal(model.diffusion_._pool, model.encoder_.transform(frame))
    model.save(tmp_path / "model")
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.augment(frame), model.augment(frame))


def test_joint_training_moves_both_networks(blobs):
    X = blobs[0]
    short, long = (tiny(joint=True, schedule=(n,)).fit(X) for n in (1, 40))
    for part in ("encoder_", "diffusion_"):
        first, last = (dict(getattr(m, part).module_.named_parameters()) for m in (short, long))
        assert any(not torch.allclose(first[k], last[k], atol=1e-3) for k in first)
    losses = long.history_
    for name in ("e_loss", "m_loss"):
        assert losses[name].iloc[-3:].mean() < losses[name].iloc[:3].mean()


@pytest.mark.parametrize("method", ["scl", "dino"])
def test_joint_training_conditions_on_what_it_is_asked_by(blobs, method, monkeypatch):
    # Standardised by the untrained encoder conditions were of size 40 to 400, in which
    # condition_noise is lost; and DINO's student is not what embeds.
    X, seen = blobs[0], []
    loss = embedding_diffusion._Fit.loss
    monkeypatch.setattr(
        embedding_diffusion._Fit, "loss", lambda self, x, c: seen.append(c) or loss(self, x, c)
    )
    encoder = tiny_encoder(method=method, batch_size=40)
    model = tiny(encoder=encoder, joint=True, schedule=(40, 0, 40)).fit(X)
    n_batches = -(-len(X) // 40)
    given = torch.cat(seen[-n_batches:]).numpy()
    asked = embedding_diffusion.standardise(model.transform(X), model.diffusion_._condition)
    assert np.sqrt(np.mean(asked**2)) == pytest.approx(1, abs=1e-3)
    away = np.linalg.norm(given[:, None] - asked, axis=2).min(axis=1)
    assert np.quantile(away, 0.9) < 0.3
    assert np.sqrt(np.mean(given**2)) == pytest.approx(1, abs=0.2)


def test_joint_training_averages_and_compiles_the_denoiser(blobs, monkeypatch):
    X, compiled = blobs[0], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    first, raw = (
        tiny(
            diffusion=tiny_diffusion(ema_decay=decay), joint=True, compile=True, schedule=(5,)
        ).fit(X)
        for decay in (0.999, None)
    )
    np.testing.assert_array_equal(first.transform(X), raw.transform(X))
    weights = (dict(model.diffusion_.module_.named_parameters()) for model in (first, raw))
    averaged, last = weights
    assert all(not torch.equal(averaged[k], last[k]) for k in averaged if averaged[k].ndim == 2)
    assert {cls.__name__ for cls in compiled} >= {type(raw.diffusion_.module_).__name__}
    assert {cls.__name__ for cls in compiled} >= {type(raw.encoder_.module_).__name__}


@pytest.mark.parametrize("method", ["dino", "byol", "mocov2"])
def test_a_teacher_follows_in_joint_training(blobs, method):
    X, schedules = blobs[0], [(1,), (8,)]
    encoder = tiny_encoder(method=method, batch_size=40)
    short, long = (
        tiny(encoder=encoder, joint=True, schedule=schedule).fit(X).encoder_.module_
        for schedule in schedules
    )
    # What embeds, or stands behind it as its teacher: nothing that learns stays where it began.
    first, last = (dict(module.named_parameters()) for module in (short, long))
    stands = [k for k in first if first[k].ndim == 2 and torch.equal(first[k], last[k])]
    assert not stands


@pytest.mark.parametrize("method", ["simsiam", "dino"])
def test_a_map_that_no_encoder_makes_is_refused_first(blobs, method, monkeypatch):
    monkeypatch.delattr(SelfSupervisedEncoder, "_fit_loop")
    with pytest.raises(ValueError, match="condition='projection' needs an encoder with"):
        tiny(encoder=tiny_encoder(method=method), condition="projection").fit(blobs[0])


# ---- parts ---------------------------------------------------------------------------------------


def test_parts_are_cloned_and_get_the_common_parameters(blobs):
    encoder, diffusion = tiny_encoder(random_state=5), tiny_diffusion()
    stops = []
    model = tiny(
        encoder=encoder, diffusion=diffusion, precision="fp32", augmentation_prob=0.3,
        callbacks=lambda epoch, history: stops.append(epoch) or False,
    ).fit(blobs[0])  # fmt: skip
    assert model.encoder_ is not encoder
    assert not hasattr(encoder, "module_")
    assert not hasattr(diffusion, "module_")
    assert model.encoder_.precision == model.diffusion_.precision == "fp32"
    assert model.encoder_.positives_prob == 0.3
    assert encoder.random_state == 5
    assert len(stops) == 5
    # What only the phases needed is gone: the parts can be fitted, saved and loaded on their own.
    assert model.encoder_.checkpoint_dir is None
    assert model.encoder_.warm_start is False


def test_automatic_parts(blobs):
    model = DiffAugEM(batch_size=77, learning_rate=5e-4, layer="norm", schedule=(1,))
    encoder = model._part("auto", SelfSupervisedEncoder, 0, 0)
    assert (encoder.batch_size, encoder.learning_rate, encoder.layer) == (77, 5e-4, "norm")
    assert encoder.random_state != model._part("auto", SelfSupervisedEncoder, 1, 0).random_state
    fitted = DiffAugEM(schedule=(1, 1, 1), random_state=0).fit(blobs[0])
    assert fitted.transform(blobs[0]).shape[1] == 50


@pytest.mark.parametrize(
    ("shape", "share"), [((60, 6), 0.5), ((3_000, 6), 0.1), ((8, 8, 8, 1), 0.1)]
)
def test_automatic_share_of_generated_views(shape, share):
    X = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    X = X if len(shape) == 2 else (255 / (1 + np.exp(-X))).astype(np.uint8)
    model = DiffAugEM(schedule=(1,), random_state=0).fit(X)
    assert model.encoder_.positives_prob == share
    assert model.augmentation_prob == "auto"


def test_wrong_parts_are_refused_before_any_work(blobs):
    model = tiny(schedule=(10**6, 1, 1))
    for part in ("encoder", "diffusion"):
        other = PCA() if part == "encoder" else tiny_em_as_part()
        with pytest.raises(TypeError, match="FrozenEstimator"):
            clone(model).set_params(**{part: other}).fit(blobs[0])
    with pytest.raises(ValueError, match="n_pcs"):
        clone(model).set_params(diffusion__n_pcs=-1).fit(blobs[0])
    with pytest.raises(ValueError, match="does not take vectors"):
        clone(model).set_params(diffusion__denoiser="unet").fit(blobs[0])
    with pytest.raises(ValueError, match=r"is called as forward\(x_t, t\)"):
        clone(model).set_params(diffusion__denoiser=torch.nn.Identity()).fit(blobs[0])
    with pytest.raises(ValueError, match="kernel"):
        clone(model).set_params(encoder__kernel="nonsense").fit(blobs[0])
    for name in ("schedule", "condition", "augmentation_prob", "n_views"):
        with pytest.raises(ValueError, match=name):
            clone(model).set_params(**{name: -1}).fit(blobs[0])


def tiny_em_as_part():
    class WithSample(PCA):
        def sample(self):
            """Draw nothing."""

    return WithSample()


def test_joint_training_holds_nothing_out(blobs):
    diffusion = tiny_diffusion(validation_fraction=0.2)
    history = tiny(diffusion=diffusion).fit(blobs[0]).history_
    assert history["validation_loss"].notna().sum() == (history["phase"] == "M").sum() > 0
    with pytest.raises(ValueError, match="joint=True has no validation"):
        tiny(diffusion=diffusion, joint=True).fit(blobs[0])


def test_frozen_encoder_keeps_its_embedding(blobs):
    X = blobs[0]
    encoder = tiny_encoder(max_epochs=3, random_state=1).fit(X)
    for part in (encoder, PCA(3).fit(X)):
        model = tiny(encoder=FrozenEstimator(part)).fit(X)
        np.testing.assert_allclose(model.transform(X), part.transform(X), rtol=1e-5, atol=1e-5)
        assert phases(model) == [("M", 0, 1)]
        assert model.augment(X).shape == X.shape
        assert len(model.get_feature_names_out()) == part.transform(X).shape[1]


def test_frozen_diffusion_keeps_its_own_condition(blobs, tmp_path):
    X = blobs[0]
    own = tiny_diffusion(encoder=tiny_encoder(n_components=3, max_epochs=2), max_epochs=2)
    own.set_params(random_state=0).fit(X)
    model = tiny(diffusion=FrozenEstimator(own), augmentation_prob=1.0).fit(X)
    assert phases(model) == [("E", 0, 2), ("E", 1, 2)]
    np.testing.assert_array_equal(model.augment(X), own.augment(X))
    assert not np.array_equal(
        model.transform(X), tiny(schedule=(2, 0, 2), augmentation_prob=1.0).fit(X).transform(X)
    )
    model.save(tmp_path / "model")
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.augment(X), model.augment(X))
    # One that was fitted on given embeddings has no encoder: that must be given too.
    given = tiny_diffusion(max_epochs=2).fit(X, embeddings=X[:, :4])
    with pytest.raises(ValueError, match=r"give the encoder that made them as .*FrozenEstimator"):
        tiny(diffusion=FrozenEstimator(given)).fit(X)
    for frozen in (given, own):  # random conditions are as wide as the generator's
        model = tiny(diffusion=FrozenEstimator(frozen), condition="random")
        assert model.fit(X).augment(X).shape == X.shape
    other = FrozenEstimator(PCA(7).fit(X))
    with pytest.raises(ValueError, match="7 features, but the model was fitted on 4"):
        tiny(encoder=other, diffusion=FrozenEstimator(given)).fit(X).augment(X)


@pytest.mark.parametrize("options", [{}, {"joint": True}])
def test_frames_as_output_change_nothing(blobs, options):
    expected = tiny(**options).fit(blobs[0]).augment(blobs[0])
    with config_context(transform_output="pandas"):
        model = tiny(**options).fit(blobs[0])
        np.testing.assert_array_equal(model.augment(blobs[0]), expected)
        assert list(model.transform(blobs[0]).columns) == [f"diffaugem{i}" for i in range(4)]


def test_frozen_parts_that_cannot_work(blobs):
    X = blobs[0]
    encoder = tiny_encoder(max_epochs=1).fit(X)
    unconditional = tiny_diffusion(encoder=None, max_epochs=1).fit(X)
    with pytest.raises(ValueError, match="unconditional"):
        tiny(diffusion=FrozenEstimator(unconditional)).fit(X)
    with pytest.raises(ValueError, match="joint=True"):
        tiny(encoder=FrozenEstimator(encoder), joint=True).fit(X)
    for unfitted in ({"encoder": tiny_encoder()}, {"diffusion": tiny_diffusion()}):
        ((name, part),) = unfitted.items()
        with pytest.raises(NotFittedError, match=type(part).__name__):
            tiny(**{name: FrozenEstimator(part)}).fit(X)
    diffusion = tiny_diffusion(max_epochs=1).fit(X, embeddings=encoder.transform(X))
    both = tiny(encoder=FrozenEstimator(encoder), diffusion=FrozenEstimator(diffusion)).fit(X)
    assert both.n_iter_ == 0
    np.testing.assert_array_equal(both.transform(X), encoder.transform(X))


def test_a_frozen_diffusion_of_other_data_is_refused_before_any_work(blobs):
    X, y = pd.DataFrame(blobs[0]).add_prefix("g"), blobs[1]
    one_hot = np.eye(y.max() + 1)[y]

    def refuse(X, diffusion, match, **more):
        def trained(epoch, history):
            pytest.fail("the encoder was trained")

        model = tiny(diffusion=FrozenEstimator(diffusion), callbacks=trained, **more)
        with pytest.raises(ValueError, match=match):
            model.fit(X, y[: len(X)])

    given = tiny_diffusion(max_epochs=1)
    supervised = {"condition": "supervised"}
    model = given.fit(X.iloc[:, ::-1], embeddings=one_hot)
    refuse(X, model, r"(?s)not like what the frozen .* same order", **supervised)
    model = given.fit(X.iloc[:, 1:], embeddings=one_hot)
    refuse(X.to_numpy(), model, "has 20 features, .* expecting 19", **supervised)
    model = given.fit(X, embeddings=np.eye(9)[y])
    refuse(X, model, f"y has {len(one_hot[0])} classes, .* of 9 columns", **supervised)
    own = tiny_diffusion(encoder=tiny_encoder(max_epochs=1), max_epochs=1)
    refuse(X, own.fit(X.iloc[:, ::-1]), "same order")
    images = np.random.default_rng(0).random((24, 8, 8, 1), dtype=np.float32)
    encoder = SelfSupervisedEncoder(max_epochs=1)
    own.set_params(encoder=encoder, block_out_channels=(8, 8)).fit(images)
    refuse(X, own, "X holds vectors, but the frozen diffusion generates images")
    refuse(images[:, :6], own, r"\(6, 8, 1\), but the frozen diffusion was fitted on \(8, 8, 1\)")
    refuse(images * 2 - 1, own, "pixels from -1.0 to 1.0, but the frozen diffusion")
    refuse((images * 255).astype(np.uint8), own, "pixels from 0 to 255, but the frozen diffusion")


def test_what_a_frozen_diffusion_generates_has_the_layout_of_the_fit():
    X = np.random.default_rng(0).random((24, 8, 8, 1), dtype=np.float32)
    encoder = FrozenEstimator(SelfSupervisedEncoder("scl", max_epochs=1).fit(X))

    def model(images, **options):
        own = tiny_diffusion(max_epochs=1, block_out_channels=(8, 8), random_state=0, **options)
        frozen = FrozenEstimator(own.fit(images, embeddings=encoder.transform(X)))
        return tiny(encoder=encoder, diffusion=frozen).fit(X)

    other = model(X.reshape(24, -1), image_shape=(8, 8, 1)).augment(X[:3])
    np.testing.assert_array_equal(other, model(X).augment(X[:3]))
    assert other.shape == (3, 8, 8, 1)


def test_a_frozen_pipeline_is_an_encoder(blobs):
    X = blobs[0]
    pipeline = FrozenEstimator(make_pipeline(PCA(3)).fit(X))
    for condition in ("embedding", "random"):
        model = tiny(encoder=pipeline, condition=condition).fit(X)
        assert model.augment(X[:2]).shape == (2, 20)
        assert list(model.get_feature_names_out()) == ["diffaugem0", "diffaugem1", "diffaugem2"]


# ---- data on disk --------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
def test_backed_fit_never_reads_the_matrix_as_a_whole(tmp_path, monkeypatch, sparse):
    rng = np.random.default_rng(0)
    n, d = 1500, 2000
    X = sp.csr_array(rng.random((n, d), dtype=np.float32) * (rng.random((n, d)) < 0.02))
    adata = ad.AnnData(X if sparse else X.toarray())
    adata.write_h5ad(tmp_path / "cells.h5ad")
    longest = [0]
    read = BackedRows._read_run

    def record(self, run):
        longest[0] = max(longest[0], int(run[-1]) + 1 - int(run[0]))
        return read(self, run)

    monkeypatch.setattr(BackedRows, "_read_run", record)
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    model = tiny(schedule=(1, 1, 1), n_views=1).fit(backed)
    y, samples = model.transform(backed), model.augment(backed)
    assert 0 < longest[0] <= n // 2
    assert backed.isbacked
    np.testing.assert_allclose(y, model.transform(ad.AnnData(X.toarray())), rtol=1e-4, atol=1e-4)
    assert samples.shape == (n, d)
    assert backed.file.is_open


# ---- what it learns ------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_end_to_end():
    X, y = load_digits(return_X_y=True)
    X = (X / 16.0).astype(np.float32)[:1000]
    y = y[:1000]
    model = DiffAugEM(
        SelfSupervisedEncoder(hidden_sizes=(64,), batch_size=200),
        EmbeddingConditionedDiffusion(width=96, n_blocks=2, n_pcs=30, batch_size=200),
        schedule=(25, 60, 25), random_state=0,
    ).fit(X)  # fmt: skip
    assert knn_accuracy(model.transform(X), y) >= 0.9
    assert knn_accuracy(model.project(X), y) >= 0.75
    report = model.quality_report(X, y)
    assert report.label_consistency >= 0.85
    assert 0.8 < report.spread_ratio < 1.2
    generated = model.augment(X)
    assert KNeighborsClassifier(5).fit(X, y).score(generated, y) >= 0.8
    e_losses = model.history_.query("phase == 'E'")["loss"].to_numpy()
    assert e_losses[-3:].mean() < e_losses[:3].mean()


def test_easy_blobs(blobs):
    X, labels = blobs
    encoder = tiny_encoder(hidden_sizes=(32,), batch_size=80)
    diffusion = tiny_diffusion(width=48, n_sampling_steps=15, batch_size=80, ema_decay=0.98)
    model = tiny(encoder=encoder, diffusion=diffusion, schedule=(15, 80, 15)).fit(X)
    assert knn_accuracy(model.transform(X), labels) >= 0.98
    assert knn_accuracy(model.project(X), labels) >= 0.98
    generated = model.augment(X, 2)
    of_source = KNeighborsClassifier(5).fit(X, labels)
    assert of_source.score(generated, np.repeat(labels, 2)) >= 0.95
    assert 0.8 < model.quality_report(X, labels).spread_ratio < 1.2


# ---- images --------------------------------------------------------------------------------------


def tiny_on_images(**more):
    encoder = SelfSupervisedEncoder("scl", "small_resnet", n_components=6, batch_size=16)
    diffusion = EmbeddingConditionedDiffusion(
        block_out_channels=(8, 8), batch_size=16, n_sampling_steps=2
    )
    options = {"schedule": (1, 1, 1), "n_views": 1, "augmentation_prob": 1.0, "random_state": 0}
    return DiffAugEM(encoder, diffusion, **{**options, **more})


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, size=(32, 8, 8, 3), dtype=np.uint8)


def test_images_go_through_the_same_algorithm(pictures, tmp_path):
    model = tiny_on_images().fit(pictures)
    assert model.image_shape_ == (8, 8, 3)
    assert model.transform(pictures).shape == (32, 6)
    assert model.project(pictures).shape == (32, 2)
    made = model.augment(pictures[:4], 2)
    assert made.shape == (8, 8, 8, 3)
    assert made.dtype == np.uint8
    assert list(model.history_["phase"]) == ["E", "M", "E"]
    alone = tiny_on_images(schedule=(1, 0, 1)).fit(pictures)
    assert not np.array_equal(alone.transform(pictures), model.transform(pictures))
    model.save(tmp_path / "model")
    loaded = diffaugkit.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.transform(pictures), model.transform(pictures))
    np.testing.assert_array_equal(loaded.augment(pictures[:2]), model.augment(pictures[:2]))


def test_flattened_images_come_back_flat(pictures):
    X = pictures.reshape(32, -1) / 255
    model = tiny_on_images(image_shape=(8, 8, 3))
    model.set_params(encoder__image_shape=(8, 8, 3), diffusion__image_shape=(8, 8, 3)).fit(X)
    made = model.augment(X[:3])
    assert made.shape == (3, 192)
    assert made.min() >= 0
    assert made.max() <= 1


def test_automatic_parts_for_images(pictures):
    model = DiffAugEM(schedule=(1,), random_state=0).fit(pictures)
    assert model.encoder_.method == "scl"
    assert DiffAugEM()._schedule(model.encoder_, 100, "images") == (200, 400, 800)
    with pytest.raises(ValueError, match="joint=True is for vectors"):
        DiffAugEM(joint=True).fit(pictures)


def test_classes_say_what_the_condition_means(blobs, tmp_path):
    X, y = blobs[0], np.array(["b", "c", "a"])[blobs[1]]
    model = tiny(schedule=(1, 1, 1), condition="supervised").fit(X, y)
    assert model.classes_.tolist() == ["a", "b", "c"]
    model.save(tmp_path / "model")
    assert diffaugkit.load(tmp_path / "model").classes_.tolist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="a column for each of classes_"):
        model.augment(X[:2])
    assert not hasattr(model.set_params(condition="embedding").fit(X), "classes_")


def test_device_reaches_the_fitted_parts(blobs):
    model = tiny(schedule=(1, 1, 1)).fit(blobs[0])
    whole = model.transform(blobs[0])
    for part in (model, model.encoder_, model.diffusion_):
        part.device = "cuda:7"  # as loaded from another machine
    model.set_params(device="cpu")
    assert model.encoder_.device == model.diffusion_.device == "cpu"
    np.testing.assert_array_equal(model.transform(blobs[0]), whole)
    model.augment(blobs[0][:3])
