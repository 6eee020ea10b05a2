"""An engine in a process of its own, for test_vllm.py.

The answers hold, per batch and request, prompt tokens, cached tokens, generated ids, their
log-probabilities over the vocabulary, and which media tokens stage I kept, in the order in which it
was asked; per batch how often a request was preempted, and the blocks that each group held at the
last step.
"""

import os

import numpy as np


def kept_by_stage_1():
    "A list that gets the kept tokens of every medium: its index in the unpruned medium."
    from seats_analysis.serving.vllm import Planner

    found, stock = [], Planner.select

    def select(self, plan, features, attention):
        rows, stay = stock(self, plan, features, attention)
        found.append((stay + plan.edge).tolist())
        return rows, stay

    Planner.select = select
    return found


def counted():
    "What the scheduler did last: its `left` blocks, and how often requests were `preempted`."
    from vllm.v1.core.sched.scheduler import Scheduler

    found, stock = dict(preempted=0), Scheduler.schedule

    def schedule(self, *args, **kwargs):
        made = stock(self, *args, **kwargs)
        found["preempted"] += len(made.preempted_req_ids or ())
        if made.total_num_scheduled_tokens:
            managers = self.kv_cache_manager.coordinator.single_type_managers
            blocks = [[b for own in m.req_to_blocks.values() for b in own] for m in managers]
            found["left"] = [sum(not b.is_null for b in held) for held in blocks]
        return made

    Scheduler.schedule = schedule
    return found


def answer(output):
    first = output.outputs[0]
    logprobs = [[d[i].logprob for i in range(len(d))] for d in first.logprobs]
    return dict(
        prompt=len(output.prompt_token_ids),
        cached=output.num_cached_tokens,
        ids=list(first.token_ids),
        logprobs=np.array(logprobs, np.float32),
    )


def answers_to(
    job,  # `env`, `engine` (arguments of `vllm.LLM`), `batches` of requests, `tokens` to generate
):
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models import registry

    os.environ.clear()
    os.environ.update(job["env"], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    # vLLM asks what a model can do in one more process, which imports everything; servers do so
    registry._run_in_subprocess = lambda ask: ask()
    llm, kept, found, counts = LLM(**job["engine"]), kept_by_stage_1(), [], counted()
    greedy = SamplingParams(
        temperature=0, max_tokens=job["tokens"], logprobs=-1, ignore_eos=True, detokenize=False
    )
    for batch in job["batches"]:
        kept.clear()
        counts["preempted"] = 0
        outputs = llm.generate(batch, greedy, use_tqdm=False)
        found.append(dict(answers=[answer(o) for o in outputs], kept=list(kept)) | counts)
    return found
