"""What stage I, and III with it, bring in vLLM, by vLLM's own benchmark: make bench-vllm

Servers of one model with random weights, without a schedule and with one, are asked in turns in
every round, so that whatever else the machine does hits all. Their KV caches are small and of equal
bytes: with many requests at once, they wait for blocks. No two runs in a row share a clip: vLLM
would not encode it again. Writes data/results/vllm_DEVICE.json, after every round.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import threading
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from vllm.benchmarks import serve

from seats_analysis.schedules.schedule import Schedule
from seats_analysis.storage.provenance import versions
from seats_analysis.storage.schemas import SCHEMAS, save_json
from seats_analysis.testbed.load import testbed_samples
from test_vllm import ENTERING, TESTS, WITHIN, Server, chat
from vllm_folder import full_checkpoint, random_thinker

SERVER = """--max-num-batched-tokens 1024 --max-num-seqs 48 --block-size 32
--no-enable-prefix-caching --mm-processor-cache-gb 0 --trust-request-mm-kwargs""".split()
GROUPS = dict(full=1, seats=1, late=2)  # of equally many layers: a block holds the layers of one


class Peak(threading.Thread):
    "Watches the KV cache of a server while the body runs."

    def __init__(self, server):
        super().__init__()
        self.server, self.over, self.usage = server, threading.Event(), 0.0

    def run(self):
        while not self.over.wait(0.2):
            self.usage = max(self.usage, float(self.find(r"kv_cache_usage_perc\S* (\S+)")))

    def find(self, pattern):
        return re.search("^vllm:" + pattern, self.server.get("metrics"), re.M)[1]

    def __enter__(self):
        self.start()
        self.preempted = -float(self.find(r"num_preemptions_total\S* (\S+)"))
        return self

    def __exit__(self, *error):
        self.over.set()
        self.join()
        self.preempted += float(self.find(r"num_preemptions_total\S* (\S+)"))


def ask(server, clips, concurrency, args, folder):
    "One run of `vllm bench serve`: a row."
    path = folder / "prompts.jsonl"
    prompts = [dict(prompt=chat(s, audio=False)["messages"]) for s in clips]
    path.write_text("\n".join(map(json.dumps, prompts)))
    body = dict(max_completion_tokens=args.generated, ignore_eos=True, temperature=0) | WITHIN
    command = f"""--backend openai-chat --endpoint /v1/chat/completions --model omni
    --base-url http://127.0.0.1:{server.port} --dataset-name custom --dataset-path {path}
    --skip-tokenizer-init --skip-chat-template --disable-shuffle --num-prompts {len(clips)}
    --max-concurrency {concurrency} --seed 0 --disable-tqdm --save-detailed"""
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    given = parser.parse_args([*command.split(), "--extra-body", json.dumps(body)])
    with Peak(server) as peak, contextlib.redirect_stdout(io.StringIO()):
        told = serve.main(given)
    if told["completed"] != len(clips):
        raise RuntimeError(f"only {told['completed']} of {len(clips)} requests were answered")
    return dict(
        concurrency=concurrency,
        prompt_tokens=told["total_input_tokens"] / len(clips),
        ttft_ms=1000 * median(told["ttfts"]),
        itl_ms=1000 * median(chain.from_iterable(told["itls"])),
        requests_per_s=told["request_throughput"],
        kv_tokens=round(peak.usage * args.pool) * 32,  # in whole blocks of all layers
        preempted=peak.preempted,
    )


def start(name, model, args, folder):
    "A server: without a schedule, with stage I, or with stages I and III."
    late, plan = args.layers // 2 if name == "late" else None, folder / f"{name}.json"
    Schedule(args.layers, entering=ENTERING, late_start=late).save(plan)
    blocks = str(GROUPS[name] * args.pool)
    own = type("Own", (Server,), dict(env=dict(SEATS_VLLM_LATE=str(int(name == "late")))))
    schedule = None if name == "full" else plan
    options = *SERVER, "--num-gpu-blocks-override", blocks
    return own(model, schedule, folder / f"{name}.log", *options).ready()


def measure(args, folder, save):
    torch.manual_seed(0)
    thinker = random_thinker(folder / "thinker", args.layers, args.width)
    model = full_checkpoint(thinker, folder / "model")
    asked = [*testbed_samples("derive"), *testbed_samples("test")]
    clips, rows, servers = list({s.video: s for s in asked}.values()), [], {}
    try:
        for name in GROUPS:
            servers[name] = start(name, model, args, folder)
            servers[name].ask(chat(clips[-1], audio=False, **WITHIN))
        print("serving:", *servers, flush=True)
        for i in range(args.rounds):
            for concurrency in args.concurrency:
                n = max(args.clips, concurrency)
                here, clips = clips[:n], clips[n:] + clips[:n]
                for name in [*servers][:: -1 if i % 2 else 1]:
                    row = ask(servers[name], here, concurrency, args, folder)
                    rows.append(dict(method=name, round=i) | row)
                    print(*rows[-1].values(), flush=True)
            save(rows)
    finally:
        [s.stop() for s in servers.values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="of the decoder")
    parser.add_argument("--width", type=int, default=768, help="of the decoder")
    parser.add_argument("--generated", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--clips", type=int, default=8, help="requests of one run, at least")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16, 48])
    parser.add_argument("--pool", type=int, default=100, help="blocks of 32 tokens, all layers")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=TESTS.parent / "data" / "results")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of the servers
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    device = found[1].strip() if found else "CPU"
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    data = dict(
        schema=SCHEMAS["vllm"].id,
        model="qwen2.5-omni",
        revision="the testbed's towers and vocabulary, random weights",
        device=device,
        threads=torch.get_num_threads(),
        dtype="float32",
        versions=versions("vllm", "torch", "transformers"),
        seed=0,
        command=" ".join(["python tests/run_vllm.py --bench", *sys.argv[1:]]),
        settings=settings | dict(entering=ENTERING, server=" ".join(SERVER)),
    )
    path = args.out / f"vllm_{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder), lambda rows: save_json(path, data | dict(rows=rows)))
    print(path)


if __name__ == "__main__":
    main()
