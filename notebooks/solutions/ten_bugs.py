"""Ten losses with one bug each, under letters, and what a check-up finds: for notebook 11.

The answers are at the end of this file: solve the case first.
"""

import broken
import lab
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

import opd

EOS = 0
_z = 2 * torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STUDENT, TEACHER = _z  # logits (B, T, V)
TOKENS = torch.tensor([[1, 2, EOS, EOS, EOS], [3, 1, 4, 2, EOS], [2, 4, 1, EOS, EOS]])


def whole_mean(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The right mean over parts of a batch: divided by the tokens of all of them."""
    total = sum(mask.sum() for _, mask in parts)
    return sum(opd.masked_mean(x, mask, total=total) for x, mask in parts)


HEALTHY = dict(
    scores=lambda logp: logp,
    mask=lambda tokens: lab.through_eos(tokens, [EOS]),
    loss=opd.reverse_kl,
    mean=whole_mean,
)


def look(
    patient: dict, z: Tensor = STUDENT, w: Tensor = TEACHER, tokens: Tensor = TOKENS, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """A patient's loss, and its gradient in the student's logits z (B, T, V); w the teacher's."""
    c, z = HEALTHY | patient, z.clone().requires_grad_()
    logp, logq = (c["scores"](x.log_softmax(-1)) for x in (z, w))
    pieces = zip(c["loss"](logp, logq).chunk(parts), c["mask"](tokens).chunk(parts), strict=True)
    loss = c["mean"]([*pieces])
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def with_padding(patient: dict) -> Tensor:
    """The loss of the same batch with three more columns of padding."""
    more = torch.ones(3, 3, 5).double()
    z, w = (torch.cat([x, more * k], 1) for k, x in enumerate((STUDENT, TEACHER)))
    return look(patient, z, w, torch.cat([TOKENS, torch.full((3, 3), EOS)], 1))[0]


def kl_change(patient: dict, size: float = 0.05) -> float:
    """How one small step on a patient's loss changes the right one, in nats per token."""
    return float(look({}, STUDENT - size * look(patient)[1])[0] - look({})[0])


def checkup(patient: dict) -> dict[str, float]:
    """Nine numbers about a patient, by name."""
    (loss, g), truth, same = look(patient), look({})[1], look(patient, STUDENT, STUDENT)
    seen, favourite = lab.through_eos(TOKENS, [EOS]), TEACHER.argmax(-1, keepdim=True)
    drawn = opd.of_tokens(STUDENT.log_softmax(-1), TOKENS)  # what the sampler noted
    read = opd.of_tokens((HEALTHY | patient)["scores"](STUDENT.log_softmax(-1)), TOKENS)
    numbers = {
        "loss at q = p": same[0],
        "gradient at q = p": same[1].norm(),
        "gradient: size, right = 1": g.norm() / truth.norm(),
        "cosine to the right one": (g * truth).sum() / (g.norm() * truth.norm()).clamp(min=1e-9),
        "at an EOS: size, right = 1": g[0, 2].norm() / truth[0, 2].norm(),
        "teacher's favourites\npushed down, of 12": (g.gather(-1, favourite)[seen] > 1e-9).sum(),
        "gap to the sampler's\nlog-probs": (read - drawn)[seen].abs().max(),
        "loss, change with\nmore padding": with_padding(patient) - loss,
        "loss, change in\n3 parts": look(patient, parts=3)[0] - loss,
    }
    return {name: float(value) for name, value in numbers.items()}


def chart(title: str) -> Figure:
    """The check-up of all patients as a picture: grey, where it is not as in a healthy loss."""
    rows = {"healthy": checkup({})} | {letter: checkup(bug) for letter, bug in PATIENTS.items()}
    figure, axis = plt.subplots(figsize=(8.4, 4.2))
    for y, (_, numbers) in enumerate(rows.items()):
        for x, (name, value) in enumerate(numbers.items()):
            ill = abs(value - rows["healthy"][name]) > 1e-6
            axis.add_patch(plt.Rectangle((x, y), 1, 1, fc="0.8" if ill else "w", ec="0.6", lw=0.6))
            axis.text(x + 0.5, y + 0.5, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center",
                      weight="bold" if ill else "normal")  # fmt: skip
    axis.set_xticks(
        [x + 0.5 for x in range(9)], rows["healthy"], rotation=35, ha="left", fontsize=8
    )
    axis.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axis.set(xlim=(0, 9), ylim=(len(rows), 0))
    figure.suptitle(title)
    axis.spines[:].set_visible(False)
    return figure


def sampled(loss: object) -> object:
    """The expected loss of a sampled-token estimator: over all tokens a, p(a) held fixed."""
    return lambda logp, logq: (logp.detach().exp() * loss(logp, logq)).sum(-1)


def padded(parts: list) -> Tensor:
    """broken.mean_with_padding of a whole batch."""
    return broken.mean_with_padding(*(torch.cat(each) for each in zip(*parts, strict=True)))


# Below are the answers.


def state_only(p: Tensor, q: Tensor) -> Tensor:
    """broken.state_only_advantage for all tokens at once."""
    return broken.state_only_advantage(p[..., None, :], q[..., None, :], p)


def truncated(p: Tensor, q: Tensor) -> Tensor:
    """broken.plainly_truncated_reverse_kl on the student's top 2."""
    return broken.plainly_truncated_reverse_kl(p, q, p.detach().topk(2).indices)


PATIENTS = {
    "A": dict(loss=sampled(broken.k3_as_loss)),
    "B": dict(mask=lambda tokens: broken.mask_by_padding(tokens, EOS)),
    "C": dict(loss=lambda p, q: broken.student_temperature_only(p, q, 2.0)),
    "D": dict(mean=broken.mean_of_micro_batch_means),
    "E": dict(loss=sampled(state_only)),
    "F": dict(scores=lambda logp: torch.cat([logp[:, :1], logp[:, :-1]], 1)),  # of both models
    "G": dict(loss=sampled(broken.live_advantage)),
    "H": dict(mean=padded),
    "I": dict(loss=truncated),
    "J": dict(loss=sampled(lambda p, q: -broken.k3_as_reward(p, q) * p)),
}  # fmt: skip
ANSWERS = dict(
    A="k3_as_loss: the right value, and 0 at q = p, but the gradient of the other KL",
    B="mask_by_padding: the real EOS is masked, so nothing is learned there",
    C="student_temperature_only: does not rest at q = p, and its loss is not 0 there",
    D="mean_of_micro_batch_means: right until the batch is split",
    E="state_only_advantage: a loss, but no gradient: it teaches nothing",
    F="like late_scores, of both models: one token late; the sampler's log-probs show it",
    G="live_advantage: the missing detach; loss 0 at q = p, gradient not: it ends at sqrt(q)",
    H="mean_with_padding: right direction, wrong size, and padding changes the loss",
    I="plainly_truncated_reverse_kl: 0 at q = p with a gradient that lowers the support's mass",
    J="k3_as_reward: rests at q = p, but its direction is reverse minus forward KL",
)
