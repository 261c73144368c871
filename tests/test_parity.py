"""Losses of other libraries on the same tensors: lightly."""

import pytest
import torch

from diffaugkit.losses import dino_loss, info_nce_queue, negative_cosine, nt_xent

lightly = pytest.importorskip("lightly.loss")


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("n_crops", [2, 10])
@pytest.mark.parametrize("teacher_temp", [0.04, 0.07])
def test_dino(n_crops, teacher_temp):
    student, teacher, center = tensors((n_crops, 16, 64), (2, 16, 64), (64,))
    theirs = lightly.DINOLoss(64, teacher_temp=teacher_temp, student_temp=0.1)
    theirs.center.copy_(center)
    expected = theirs(list(teacher), list(student), teacher_temp=teacher_temp)
    ours = dino_loss(student, teacher, center, 0.1, teacher_temp)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)


def test_center_moves_as_theirs():
    from diffaugkit.networks import DINOHead, EmbeddingMLP
    from diffaugkit.objectives import DINOObjective

    theirs = lightly.DINOLoss(32, center_momentum=0.9)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = DINOObjective(EmbeddingMLP(6, 8, head=DINOHead(8, 32, 16, 16)), 32).eval()
        for seed in range(3):
            views = tensors((5, 6), (5, 6), seed=seed)
            raw = [ours.teacher(view)[1] for view in views]
            student = [ours.network(view)[1] for view in views]
            expected = theirs(raw, student, teacher_temp=0.04)
            assert ours.loss(views)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
            torch.testing.assert_close(ours.center, theirs.center.flatten(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent(temperature):
    a, b = tensors((16, 8), (16, 8))
    expected = lightly.NTXentLoss(temperature=temperature)(a, b)
    assert nt_xent(a, b, temperature).item() == pytest.approx(expected.item(), rel=1e-6)


def test_info_nce_with_a_queue():
    queries, keys, queue = tensors((16, 8), (16, 8), (40, 8))
    with torch.random.fork_rng():
        theirs = lightly.NTXentLoss(temperature=0.2, memory_bank_size=(40, 8))
    theirs.memory_bank.bank = torch.nn.functional.normalize(queue)
    expected = theirs(queries, keys)
    assert info_nce_queue(queries, keys, queue, 0.2).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_negative_cosine():
    a, b = tensors((16, 8), (16, 8))
    expected = lightly.NegativeCosineSimilarity()(a, b)
    assert negative_cosine(a, b).item() == pytest.approx(expected.item(), rel=1e-6)
