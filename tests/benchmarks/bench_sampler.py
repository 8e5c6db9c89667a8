"""The sampler against transformers' generate: same model, cache on, log-probs returned, one run.

    python tests/benchmarks/bench_sampler.py

Two cases for each model: all rows run to the end (no EOS), and most rows stop early (a tenth of the
vocabulary ends a row, so most stop within 30 of 256 tokens).  The two samplers take turns; reported
are medians and the median ratio.  generate keeps finished rows in the batch; ours drops them.
"""

import time
from statistics import median

import torch
from common import opd, random_llama

REPEATS = 15
MODELS = {  # name: V, (hidden, intermediate, layers, heads), batch, tokens
    "V 64, d 128": (64, (128, 384, 2, 4), 64, 48),
    "V 64, d 128, more rows": (64, (128, 384, 2, 4), 256, 48),
    "V 32,000, d 256": (32_000, (256, 768, 4, 4), 16, 64),
}


def theirs(model, prompts, tokens, eos):
    out = model.generate(
        prompts.ids, attention_mask=prompts.mask.long(), do_sample=True, top_k=0, top_p=1.0,
        max_new_tokens=tokens, use_cache=True, eos_token_id=eos or None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    logp = torch.stack(out.logits, dim=1).log_softmax(-1)
    return opd.of_tokens(logp, out.sequences[:, prompts.ids.shape[1] :])


def ours(model, prompts, tokens, eos):
    return opd.sample(model, prompts, horizon=tokens, eos_ids=eos).logprobs


def main():
    torch.set_num_threads(2)
    print("| model | rows | generate, s | ours, s | generate / ours |\n|---|---|---|---|---|")
    for name, (V, size, B, tokens) in MODELS.items():
        model = random_llama(V, size, seed=1, positions=512)
        ids = torch.randint(V, (B, 16), generator=torch.Generator().manual_seed(0))
        prompts = opd.Prompts(ids, torch.ones_like(ids, dtype=torch.bool), [], [])
        for case, n, eos in (("to the end", tokens, []), ("stop early", 256, list(range(V // 10)))):
            seconds = {theirs: [], ours: []}
            for repeat in range(REPEATS + 1):
                for sampler in seconds:
                    torch.manual_seed(repeat)
                    start = time.perf_counter()
                    with torch.no_grad():
                        sampler(model, prompts, n, eos)
                    seconds[sampler].append(time.perf_counter() - start)
            a, b = seconds[theirs][1:], seconds[ours][1:]
            ratio = median(x / y for x, y in zip(a, b, strict=True))
            print(
                f"| {name}, batch {B} | {case} | {median(a):.3f} | {median(b):.3f} | {ratio:.2f} |"
            )


if __name__ == "__main__":
    main()
