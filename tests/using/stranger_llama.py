"""What llama.cpp makes of GGUF files: knows nothing of this project. Its answers are JSON.

    python stranger_llama.py '{"texts": [...], "prompts": [[1, 2]], "new": 9, "plain": 7}' FILE ...

For each file: the tokens of the texts, the logarithm of every token's probability after each of the
prompts, and the most probable new tokens after each. plain: a token of whole characters.
"""

import json
import sys
import urllib.request

import xllamacpp


def started(file, is_exact):
    """A server; exact: with everything in float32, as transformers computes."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.warmup = False
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    if is_exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def ask(server, path, **question):
    request = urllib.request.Request(
        server.listening_address + path,
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def probabilities(server, prompt, plain):
    """By token. The one that is drawn must be shown, and so must be whole characters."""
    vocabulary = 100_000
    answer = ask(
        server,
        "/completion",
        prompt=prompt,
        n_predict=1,
        n_probs=vocabulary,
        cache_prompt=False,
        logit_bias=[[plain, 1000.0]],
    )
    top = answer["completion_probabilities"][0]["top_logprobs"]
    return {one["id"]: one["logprob"] for one in top}


question, answers = json.loads(sys.argv[1]), []
for file in sys.argv[2:]:
    server = started(file, is_exact="f32" in file)
    answers.append(
        {
            "texts": [
                ask(server, "/tokenize", content=text)["tokens"] for text in question["texts"]
            ],
            "logprobs": [
                probabilities(server, prompt, question["plain"]) for prompt in question["prompts"]
            ],
            "greedy": [
                ask(
                    *(server, "/completion"),
                    prompt=prompt,
                    n_predict=question["new"],
                    temperature=0,
                    return_tokens=True,
                )["tokens"]
                for prompt in question["prompts"]
            ],
        }
    )
    del server
print(json.dumps(answers))
