# %% [markdown]
"""# Watching an unlearning loop of one's own

A training loop of another package, in plain PyTorch: its own model, data, losses and steps. While
it unlearns, it asks `gf.functional` four questions:

1. `per_sample_inner_products`: which sample to forget hurts what must stay?
2. `pairwise_inner_products`: which retained sample does it hurt?
3. `grad_inner_products`: in which layers?
4. `per_sample_grad_norms`: which sample pulls too hard?

It runs from top to bottom in less than a minute, or cell by cell in an editor that knows `# %%`:

    python examples/unlearning_loop.py
"""

# %%
from __future__ import annotations

import copy
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import geffect_fast as gf
from geffect_fast.demo.authors import make_fictitious_authors, split_forget

torch.manual_seed(0)

# %% [markdown]
# ## Data
#
# Ten questions about each of eight invented authors, always the same ten facts. One author is to be
# forgotten. And a mistake, as they happen: a question about an author who stays, in other words
# than in the retain set, has strayed into the forget set.

# %%
N_FACTS, TWIN = 10, 3
forget_rows, retain_rows = split_forget(make_fictitious_authors(8, seed=1), 0.125)
STRAY = len(forget_rows)
forget_rows.append(
    {part: retain_rows[TWIN][f"paraphrased_{part}"] for part in ("question", "answer")}
)
print(f"{len(forget_rows)} rows to forget, {len(retain_rows)} to retain")
print(f"row {STRAY}, the stray: {forget_rows[STRAY]['question']} {forget_rows[STRAY]['answer']}")
print(f"its twin, to retain: {retain_rows[TWIN]['question']} {retain_rows[TWIN]['answer']}")


def split_words(text: str) -> list[str]:
    """Split into words and punctuation: a tokenizer of our own."""
    return re.findall(r"\w+|[^\w\s]", text)


texts = [f"{row['question']} {row['answer']}" for row in [*forget_rows, *retain_rows]]
vocabulary = ["<end>", *sorted({word for text in texts for word in split_words(text)})]
ids = {word: i for i, word in enumerate(vocabulary)}


def make_batch(rows: list[dict]) -> dict[str, Tensor]:
    """Pad rows to one batch: `input_ids`, `attention_mask`, and `answer`, 1 at answers' tokens."""
    questions = [split_words(row["question"]) for row in rows]
    answers = [[*split_words(row["answer"]), "<end>"] for row in rows]
    samples = [q + a for q, a in zip(questions, answers, strict=True)]
    shape = len(rows), max(map(len, samples))
    batch = {name: torch.zeros(shape).long() for name in ("input_ids", "attention_mask", "answer")}
    for i, (question, sample) in enumerate(zip(questions, samples, strict=True)):
        batch["input_ids"][i, : len(sample)] = torch.tensor([ids[word] for word in sample])
        batch["attention_mask"][i, : len(sample)] = 1
        batch["answer"][i, len(question) : len(sample)] = 1
    return batch


def take(batch: dict[str, Tensor], rows: Tensor | slice) -> dict[str, Tensor]:
    """Take rows of a batch."""
    return {name: x[rows] for name, x in batch.items()}


forget, retain = make_batch(forget_rows), make_batch(retain_rows)

# %% [markdown]
# ## Model and loss
#
# All that `gf.functional` asks for is a function of model and batch that returns **one loss a
# sample**. Any model in evaluation mode will do; this one has 0.9 million parameters.

# %%
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
).eval()
nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids)} words")


def answer_logprob(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean log-probability of every sample's answer tokens, `(n,)`."""
    logits = model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits[:, :-1]
    logprob = -F.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")
    mask = batch["answer"][:, 1:]
    return (logprob * mask).sum(1) / mask.sum(1)


def nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of fine-tuning, one a sample; its mean is the risk."""
    return -answer_logprob(model, batch)


@torch.no_grad()
def risk(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Mean loss."""
    return float(nll(model, batch).double().mean())


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Plain autograd, by parameter name."""
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


# %% [markdown]
# ## Fine-tuning
#
# Until the model mostly knows the answers.

# %%
everything = make_batch([*forget_rows, *retain_rows])
adam = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
for _ in range(14):
    for chosen in torch.randperm(len(texts)).split(16):
        adam.zero_grad()
        nll(model, take(everything, chosen)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
print(f"loss a token: {risk(model, forget):.3f} to forget, {risk(model, retain):.3f} to retain")

# %% [markdown]
# ## The objective
#
# NPO compares with the model as it was, whose log-probabilities travel in the batch.

# %%
with torch.no_grad():
    forget["reference"] = answer_logprob(model, forget)


def npo(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`-2/b log sigmoid(-b log(p / p_reference))` with b = 1, one a sample."""
    return -2 * F.logsigmoid(batch["reference"] - answer_logprob(model, batch))


# %% [markdown]
# ## Which sample hurts?
#
# The direction is the gradient of the retain risk, from plain autograd. A step `lr` on the mean of
# the objective changes that risk by `-lr e`, and `e` is the sum of these shares: where one is
# negative, forgetting that sample hurts. The norm says how hard the sample pulls.

# %%
direction = gradient(model, nll(model, retain).mean())
shares = gf.functional.per_sample_inner_products(model, npo, forget, direction) / len(forget_rows)
norms = gf.functional.per_sample_grad_norms(model, npo, forget)

print("row      share    norm")
for i in shares.argsort().tolist():
    print(f"{i:3} {shares[i]:10.5f} {norms[i]:7.2f}  {forget_rows[i]['question']}")
print(f"sum {shares.sum():10.5f}")

# %% [markdown]
# A few rows do most of the harm, and a loud one need not be among them. Some shares are positive:
# forgetting those rows even helps. Nothing points at the stray yet: this is a mean over seventy
# retained samples, and it harms one.
#
# ## Whom does it hurt?
#
# The same products for all pairs. One function serves both sides: it sees which batch it was given.

# %%


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The objective for samples with a reference, the risk for others."""
    return npo(model, batch) if "reference" in batch else nll(model, batch)


pairs = gf.functional.pairwise_inner_products(model, own_loss, forget, retain)
most_hurt = pairs.argmin(1).tolist()

print("row    pair  the row, and the retained sample that it hurts most")
for i, j in enumerate(most_hurt):
    print(f"{i:3} {pairs[i, j]:7.3f}  {forget_rows[i]['question']}")
    print(f"{'':13}{retain_rows[j]['question']}")
n_same = sum(j % N_FACTS == i for i, j in enumerate(most_hurt[:STRAY]))
print(f"{n_same} of {STRAY} rows hurt most where the same fact is asked of another author")
first, second = pairs[:, TWIN].argsort()[:2].tolist()
print(
    f"the stray's twin is hurt most by row {first} ({pairs[first, TWIN]:.3f}),"
    f" then by row {second} ({pairs[second, TWIN]:.3f})"
)

# %% [markdown]
# The rule is plain: what the model forgets about one author's mother, it forgets about mothers. And
# the stray is found: the sample it hurts most asks for the same fact about the very same author.
#
# ## In which layers?
#
# The products of two whole gradients, one number a group of parameters; they add up to the sum
# above.

# %%


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    if found := re.search(r"layers\.(\d+)\.(self_attn|mlp)", name):
        return f"layer {found[1]} {found[2]}"
    return "embeddings" if "embed" in name else "head" if "lm_head" in name else "norms"


groups = {name: group_of(name) for name, _ in model.named_parameters()}
labels = list(dict.fromkeys(groups.values()))
objective_grad = gradient(model, npo(model, forget).mean())
by_group = gf.functional.grad_inner_products(direction, objective_grad, groups)

for label, e in zip(labels, by_group.tolist(), strict=True):
    bar = ("-" if e < 0 else "+") * round(30 * abs(e) / float(by_group.abs().max()))
    print(f"{label:18} {e:9.5f} {bar}")
print(f"{'sum':18} {by_group.sum():9.5f}")

# %% [markdown]
# The harm is done early, in the first layer and what is right behind it; the head's steps help.
#
# ## Is first order right?
#
# Predicted, `-lr e`, beside the risk of a model that has made the step.

# %%


def move(model: nn.Module, step: dict[str, Tensor], lr: float) -> nn.Module:
    """Descend: `theta - lr step`, in place."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p -= lr * step[name]
    return model


changes = {}
print("   lr  predicted   measured  ratio")
for lr in (0.001, 0.003, 0.01, 0.03, 0.1):
    moved = move(copy.deepcopy(model), objective_grad, lr)
    predicted, measured = -lr * float(shares.sum()), risk(moved, retain) - risk(model, retain)
    changes[lr] = predicted, measured
    print(f"{lr:5} {predicted:10.6f} {measured:10.6f} {measured / predicted:6.2f}")

# %% [markdown]
# Yes, for small steps. Larger ones do more harm than predicted: close to a minimum of the risk,
# where fine-tuning ends, its gradient is small and curvature takes over. So the loop has to look
# again every few steps.
#
# ## The loop
#
# It ends when the loss on the ten rows is above 3. It runs as it is, then without the stray, then
# acting on what it sees as well:
#
# - a row that pulls three times as hard as the median row is held to that, by a weight;
# - what points against retention is taken out of the step, group by group.

# %%
LR, EVERY, ENOUGH = 0.02, 5, 3.0
to_forget = take(forget, slice(STRAY))


def without_harm(step: dict[str, Tensor], direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """Project, group by group, where the inner product is negative: `s - d <s, d> / <d, d>`."""
    e = gf.functional.grad_inner_products(step, direction, groups)
    factors = e.clamp(max=0) / gf.functional.grad_inner_products(direction, direction, groups)
    by_label = dict(zip(labels, factors, strict=True))
    return {name: s - by_label[groups[name]] * direction[name] for name, s in step.items()}


def unlearn(batch: dict[str, Tensor], act: bool) -> nn.Module:
    """Run the loop and print what it sees, every few steps."""
    student = copy.deepcopy(model)
    print("step  forget  retain  predicted  measured  worst row")
    for i in range(200):
        if seen := i % EVERY == 0:
            direction = gradient(student, nll(student, retain).mean())
            shares = gf.functional.per_sample_inner_products(student, npo, batch, direction)
            norms = gf.functional.per_sample_grad_norms(student, npo, batch)
            weights = (3 * norms.median() / norms).clamp(max=1) if act else torch.ones_like(norms)
        step = gradient(student, (weights * npo(student, batch)).mean())
        if act:
            step = without_harm(step, direction)
        if seen:
            forgotten, before = risk(student, to_forget), risk(student, retain)
            predicted = -LR * float(gf.functional.grad_inner_products(step, direction).sum())
        move(student, step, LR)
        if seen:
            measured = risk(student, retain) - before
            print(
                f"{i:4} {forgotten:7.2f} {before:7.3f} {predicted:10.1e} {measured:9.1e}"
                f"  {int(shares.argmin())}"
            )
        if risk(student, to_forget) > ENOUGH:
            break
    return student


students = {"before": model}
for name, batch, act in (
    ("as it is", forget, False),
    ("without the stray", to_forget, False),
    ("acting as well", to_forget, True),
):
    print(f"\n{name}")
    students[name] = unlearn(batch, act)

twin = take(retain, slice(TWIN, TWIN + 1))
print(f"\n{'':18} forget  retain   twin")
risks = {
    name: (risk(student, to_forget), risk(student, retain), risk(student, twin))
    for name, student in students.items()
}
for name, (forgotten, retained, of_twin) in risks.items():
    print(f"{name:18} {forgotten:6.2f} {retained:7.3f} {of_twin:6.2f}")

# %% [markdown]
# Where the loop acts, the predicted harm is nothing, by construction; what is measured is
# curvature, and between two looks a direction that grows old. As much is forgotten for a fraction
# of the harm, at the price of one gradient of the risk every five steps.
#
# What surprises: leaving the stray out saves next to nothing, not even its twin. The row that comes
# second in the twin's column of pairs asks for the same fact; it is there to be forgotten, and it
# takes the twin along.
