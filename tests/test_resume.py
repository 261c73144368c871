"""DiffAugEM in the face of kill -9, and in two processes at once."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import diffaugkit
from diffaugkit import (
    AttentionMILClassifier,
    DiffAugEM,
    EmbeddingConditionedDiffusion,
    SelfSupervisedEncoder,
    encoder_fits,
    persistence,
    training,
)

ROOT = Path(__file__).parents[1]
SCHEDULE = (4, 4, 4, 3, 4)


def model(**more):
    encoder = SelfSupervisedEncoder(hidden_sizes=(8,), n_components=4, n_pcs=6, batch_size=40)
    diffusion = EmbeddingConditionedDiffusion(
        width=8, n_blocks=1, n_pcs=6, n_sampling_steps=2, batch_size=40, ema_decay=0.9
    )
    options = {"schedule": SCHEDULE, "n_views": 2, "augmentation_prob": 0.5, "random_state": 0}
    return DiffAugEM(encoder, diffusion, **{**options, **more})


def data():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    return (rng.normal(scale=3, size=(3, 12))[labels] + rng.normal(size=(120, 12))).astype("f4")


def outcome(fitted):
    """All that a fit gives, as arrays by name."""
    X = data()
    arrays = {"y": fitted.transform(X), "z": fitted.project(X)}
    arrays |= {"sample": fitted.diffusion_.sample(5), "augment": fitted.augment(X)}
    for part in ("encoder_", "diffusion_"):
        state = getattr(fitted, part).module_.state_dict()
        arrays |= {f"{part}.{name}": tensor.numpy() for name, tensor in state.items()}
    history = fitted.history_.assign(phase=fitted.history_["phase"].map(["E", "M", "EM"].index))
    return arrays | {"history": history.to_numpy(float)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def run(script, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)


# ---- kill -9 -------------------------------------------------------------------------------------

KILLED = """
    import os, random, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import numpy as np
    import test_resume as t

    def child(folder, out, kind="", at=-1, **options):
        # Forked, as torch takes seconds to import. Kills hit a batch or a call of a checkpoint.
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1]
        try:
            count = [0]

            def dies(name, call):
                def run(*args, **kwargs):
                    count[0] += name == kind
                    if count[0] == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **kwargs)
                return run

            from diffaugkit import embedding_diffusion, encoder
            encoder.VectorFit.loss = dies("E", encoder.VectorFit.loss)
            embedding_diffusion._Fit.loss = dies("M", embedding_diffusion._Fit.loss)
            os.replace, os.fsync = dies("replace", os.replace), dies("fsync", os.fsync)
            fitted = t.model(checkpoint_dir=folder, **options).fit(t.data())
            np.savez(out, **t.outcome(fitted))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)

    base = Path({base!r})
    t.model(schedule=(1, 1, 1)).fit(t.data()).sample = None  # imports much, once for all children
    options = {options!r}
    assert child(None, base / "whole.npz", **options) == 0
    whole = dict(np.load(base / "whole.npz"))
    random.seed({seed})
    for number, (kind, most) in enumerate({kills!r}):
        folder, out = base / f"fit{{number}}", base / f"out{{number}}.npz"
        at = random.randint(1, most)
        assert child(folder, out, kind, at, **options) == signal.SIGKILL, (kind, at)
        again = random.randint(1, 12)  # and once more, wherever that is
        assert child(folder, out, random.choice("EM"), again, **options) in (signal.SIGKILL, 0)
        assert child(folder, out, **options) == 0, (kind, at, again)
        t.assert_same(dict(np.load(out)), whole)
        # A finished run comes back at once, the same.
        assert child(folder, out, "E", 1, **options) == 0, "a finished run trained again"
        t.assert_same(dict(np.load(out)), whole)
    print("equal")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("options", "kills"),
    [
        # 3 batches an epoch: 12 in an E-step, 12 and 9 in the M-steps. 3 renames a checkpoint.
        ({}, [("E", 12), ("E", 36), ("M", 12), ("M", 21), ("replace", 57), ("fsync", 57)]),
        ({"joint": True, "schedule": (3, 2, 3)}, [("E", 24), ("M", 24), ("replace", 24)]),
        ({"condition": "random", "schedule": (2, 3, 2)}, [("M", 9)]),
    ],
    ids=["em", "joint", "random"],
)
def test_killed_at_random_moments_ends_bit_for_bit_equal(tmp_path, options, kills):
    script = textwrap.dedent(KILLED).format(
        tests=str(ROOT / "tests"), base=str(tmp_path), options=options, kills=kills, seed=2
    )
    done = run(script)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "equal" in done.stdout


@pytest.mark.parametrize("phase", range(5))
def test_interrupted_in_each_phase(tmp_path, phase):
    # The same in one process: Ctrl-C in the middle of each phase.
    X, epochs = data(), [0]
    stop_at = sum(SCHEDULE[:phase]) + 2

    def interrupt(epoch, history):
        epochs[0] += 1
        if epochs[0] == stop_at:
            raise KeyboardInterrupt

    folder = tmp_path / "fit"
    with pytest.raises(KeyboardInterrupt):
        model(checkpoint_dir=folder, callbacks=interrupt).fit(X)
    epochs[0] = 10**6
    resumed = model(checkpoint_dir=str(folder), callbacks=interrupt).fit(X)
    # The epoch in which it stopped has no checkpoint yet.
    assert epochs[0] - 10**6 == sum(SCHEDULE) - stop_at + 1
    assert_same(outcome(resumed), outcome(model().fit(X)))


def test_checkpoints_of_another_fit_are_refused(tmp_path):
    X = data()
    model(checkpoint_dir=tmp_path, schedule=(2, 1, 2)).fit(X)
    for other, changed in ((model(random_state=1), X), (model(), X + 1)):
        other.set_params(checkpoint_dir=tmp_path, schedule=(2, 1, 2))
        with pytest.raises(ValueError, match="holds the checkpoint of another fit"):
            other.fit(changed)


def bags(seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(12) % 2
    return [rng.normal(size=(3, 4)) + 3 * label for label in y], y


def small(kind, **more):
    part = getattr(model(), kind).set_params(max_epochs=1, random_state=0)
    return part.set_params(encoder=None, **more) if kind == "diffusion" else part.set_params(**more)


SHAPING = [
    (small, "encoder", {"nu_projection": 0.01}, r"nu_projection \(1\.0 there, 0\.01 here\)"),
    (small, "encoder", {"method": "simclr"}, "method"),
    (small, "encoder", {"n_neighbors": 5}, "n_neighbors"),
    (small, "diffusion", {"prediction_type": "sample"}, "prediction_type"),
    (small, "diffusion", {"beta_schedule": "linear"}, "beta_schedule"),
    (small, "diffusion", {"loss_weighting": "p2"}, "loss_weighting"),
    (small, "diffusion", {"n_timesteps": 50}, "n_timesteps"),
]


@pytest.mark.parametrize(("make", "kind", "changed", "named"), SHAPING)
def test_what_shapes_a_fit_is_part_of_its_checkpoint(tmp_path, make, kind, changed, named):
    X = data()
    make(kind, checkpoint_dir=tmp_path).fit(X)
    with pytest.raises(ValueError, match=f"another fit; it differs in .*{named}"):
        make(kind, checkpoint_dir=tmp_path, **changed).fit(X)


def test_what_is_used_after_a_fit_may_change(tmp_path):
    X, later = data(), {"guidance_scale": 2.0, "sampler": "ddim", "n_sampling_steps": 3}
    first = small("diffusion", checkpoint_dir=tmp_path).fit(X)
    second = small("diffusion", checkpoint_dir=tmp_path, verbose=1, **later).fit(X)
    for a, b in zip(first.module_.parameters(), second.module_.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_changed_row_is_other_data(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 6)).astype("f4")
    y = rng.integers(2, size=600)
    small("encoder", checkpoint_dir=tmp_path / "rows").fit(X)
    X[1] += 1  # none of 256 evenly spaced rows
    with pytest.raises(ValueError, match="differs in data"):
        small("encoder", checkpoint_dir=tmp_path / "rows").fit(X)
    options = {"schedule": (1, 1, 1), "condition": "supervised"}
    model(**options, checkpoint_dir=tmp_path / "labels").fit(X, y)
    y[1] = 1 - y[1]
    with pytest.raises(ValueError, match="differs in data"):
        model(**options, checkpoint_dir=tmp_path / "labels").fit(X, y)


def test_the_instances_of_bags_are_part_of_a_checkpoint(tmp_path):
    def classifier():
        return AttentionMILClassifier(max_epochs=2, random_state=0, checkpoint_dir=tmp_path)

    X, y = bags()
    classifier().fit(X, y)
    classifier().fit(X, y)
    with pytest.raises(ValueError, match="differs in bags"):
        classifier().fit(bags(seed=1)[0], y)


def test_a_long_epoch_is_saved_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    X, calls = data(), [0]
    loss = encoder_fits.VectorFit.loss

    def dies(self, *batch):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return loss(self, *batch)

    monkeypatch.setattr(encoder_fits.VectorFit, "loss", dies)
    with pytest.raises(KeyboardInterrupt):  # in the last batch of the first epoch
        small("encoder", checkpoint_dir=tmp_path).fit(X)
    resumed = small("encoder", checkpoint_dir=tmp_path).fit(X)
    assert calls[0] == 4  # two batches were kept
    np.testing.assert_array_equal(resumed.transform(X), small("encoder").fit(X).transform(X))


@pytest.mark.parametrize("kind", ["encoder", "diffusion"])
def test_parts_resume_on_their_own(tmp_path, kind):
    X = data()
    part = getattr(model(), kind).set_params(max_epochs=4, random_state=0)
    if kind == "diffusion":
        part.set_params(encoder=model().encoder.set_params(max_epochs=2))

    def stop(epoch, history):
        if epoch == 2:
            raise KeyboardInterrupt

    part.set_params(checkpoint_dir=tmp_path, callbacks=stop)
    with pytest.raises(KeyboardInterrupt):
        part.fit(X)
    resumed = part.set_params(callbacks=None).fit(X).transform(X)
    whole = part.set_params(checkpoint_dir=None).fit(X).transform(X)
    np.testing.assert_array_equal(resumed, whole)


# ---- two processes -------------------------------------------------------------------------------

TOGETHER = """
    import contextlib, os, sys
    sys.path.insert(0, {tests!r})
    import numpy as np
    import test_resume as t

    for name in ("em", "joint"):
        options = {{"device": "cpu", "schedule": (3, 3, 3), "joint": name == "joint", "verbose": 1}}
        bars = open(os.path.join({base!r}, name + os.environ["RANK"] + ".bars"), "w")
        with bars, contextlib.redirect_stderr(bars):
            fitted = t.model(**options).fit(t.data())
        np.savez(os.path.join({base!r}, name + os.environ["RANK"]), **t.outcome(fitted))
        if os.environ["RANK"] == "0":
            fitted.save(os.path.join({base!r}, name))
"""


@pytest.mark.slow
def test_two_processes_give_one_model(tmp_path):
    script = tmp_path / "train.py"
    text = TOGETHER.format(tests=str(ROOT / "tests"), base=str(tmp_path))
    script.write_text(textwrap.dedent(text))
    # `accelerate launch --cpu --num_processes 2` starts one process unless there is mpirun; with
    # --multi_gpu it starts two, and the device of the model says that both take the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {"GLOO_SOCKET_IFNAME": "lo", "HF_HOME": str(tmp_path / "home")}
    env |= {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("em", "joint"):
        shown = (tmp_path / f"{name}0.bars").read_text()
        assert all(bar in shown for bar in ("neighbors", "-step", "sampling"))
        assert not (tmp_path / f"{name}1.bars").read_text()
        first, second = (dict(np.load(tmp_path / f"{name}{rank}.npz")) for rank in (0, 1))
        assert_same(first, second)
        loaded = diffaugkit.load(tmp_path / name)
        assert_same(outcome(loaded), first)
        alone = outcome(model(schedule=(3, 3, 3), joint=name == "joint").fit(data()))
        # Half the batch in each process sees other statistics and other draws: a model of the
        # same quality, not the same one.
        table = pd.DataFrame({"together": first["history"][:, 3], "alone": alone["history"][:, 3]})
        assert np.isfinite(table).all(axis=None)
        assert table["together"].iloc[-1] == pytest.approx(table["alone"].iloc[-1], rel=0.5)
    assert not torch.distributed.is_initialized()


def test_a_folder_that_holds_other_files_is_refused_before_any_work(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "slide.png").write_bytes(b"mine")
    epochs = []
    encoder = small("encoder", checkpoint_dir=tmp_path, callbacks=lambda *_: epochs.append(1))
    with pytest.raises(persistence.ModelFileError, match=r"holds other files .*slide\.png"):
        encoder.fit(data())
    assert not epochs
    (tmp_path / "training" / "slide.png").rename(tmp_path / "training" / ".DS_Store")
    encoder.fit(data())


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    small("encoder", checkpoint_dir=tmp_path).fit(data())
    next((tmp_path / "training").glob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(persistence.ModelFileError, match="Remove that folder to start anew"):
        small("encoder", checkpoint_dir=tmp_path).fit(data())
