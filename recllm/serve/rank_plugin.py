"""Ranking inside vLLM's server, as a plugin (entry point vllm.endpoint_plugins): one HTTP hop, not one a token.

    POST /recllm/rank  {prompt_token_ids, gate_weights, k, width, excluded}     beam search over the adapter's item trie
                       {prompt_token_ids, gate_weights, k, candidates}          the likelihood of each candidate
                       → {"items": item indices, best first, "scores": nats}
    GET  /recllm/rank  → {"titles": …}: the plugin is there and the trie is built

`recllm serve` starts vLLM with this and names the adapter in SERVED; without that variable the routes answer 404. The
engine is asked as vLLM's own handlers ask it, through `EngineClient.generate`.
"""

import asyncio
import hmac
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.infer.beams import Beam
from recllm.infer.item_trie import ItemTrie, catalogue_trie
from recllm.infer.vllm_engine import check_reports
from recllm.infer.vllm_plugin import hooks
from recllm.infer.vllm_plugin.gates import has_gate
from recllm.infer.vllm_requests import BeamDriver, forced, read_forced
from recllm.model.base_model import load_tokenizer
from recllm.serve.front_door import CLIENT_GONE, RANK, while_connected
from recllm.serve.vllm_server import PLUGINS, SERVED

STATE = "recllm_ranker"  # of the application


class RankPlugin:
    """What vLLM loads."""

    name = PLUGINS["vllm.endpoint_plugins"]  # in VLLM_PLUGINS
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.add_api_route(RANK, show, methods=["GET"])
        app.add_api_route(RANK, rank, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Build the trie, before the server takes its first request."""
        served = json.loads(os.environ.get(SERVED, "null"))
        if served is None or engine_client is None:
            return
        if has_gate(served["adapter"]):  # or its answers would be the plain LoRA's, without a word
            check_reports(await engine_client.collective_rpc("recllm_gates"))
        lora = state.openai_serving_models.lora_requests[served["name"]]
        trie = None
        if served["end"] is not None:
            started = time.monotonic()
            titles = Dataset.open(Path(served["adapter"])).titles
            trie = await asyncio.to_thread(catalogue_trie, load_tokenizer(args.model), titles, served["end"])
            print(f"recllm: a trie of {trie.num_titles} titles, {time.monotonic() - started:.1f} s", flush=True)
        setattr(state, STATE, Ranker(engine_client, lora, trie))


class Wanted(NamedTuple):
    """The body of a request; it comes from the gateway, which has checked what its clients sent."""

    prompt_token_ids: list[int]
    k: int
    gate_weights: list[float] | None = None
    width: int = 0
    excluded: Sequence[int] = ()
    candidates: Sequence[int] | None = None


async def show(request: Request) -> Response:
    """What this server ranks."""
    if (refusal := _refusal(request)) is not None:
        return refusal
    ranker = getattr(request.app.state, STATE)
    return JSONResponse({"titles": ranker.trie.num_titles if ranker.trie else 0})


async def rank(request: Request) -> Response:
    """The best items for a prompt."""
    if (refusal := _refusal(request)) is not None:
        return refusal
    ranker: Ranker = getattr(request.app.state, STATE)
    try:
        wanted = Wanted(**await request.json())
    except (TypeError, ValueError) as error:
        return _error(400, f"the body is no ranking's ({error})")
    try:
        items, scores = await while_connected(request.receive, ranker.rank(wanted))
    except (UserError, hooks.InvalidGate) as error:
        return _error(400, str(error))
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    return JSONResponse({"items": items, "scores": scores})


def _refusal(request: Request) -> Response | None:
    """vLLM asks for its key below /v1 only; these routes ask too."""
    key = os.environ.get("VLLM_API_KEY")
    if key and not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
        return _error(401, "Authorization is missing or wrong")
    if getattr(request.app.state, STATE, None) is None:
        return _error(404, f"{SERVED} names no adapter: start the server with `recllm serve`")
    return None


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "recllm", "code": status}}, status)


class Ranker:
    """Ranks one adapter's catalogue.

    Args:
        engine: vLLM's EngineClient.
        lora: vLLM's LoRARequest of the adapter.
        trie: of the catalogue; None: nothing is ranked.
    """

    def __init__(self, engine: Any, lora: Any, trie: ItemTrie | None) -> None:
        self.engine, self.lora, self.trie = engine, lora, trie
        self.context = engine.vllm_config.model_config.max_model_len
        self.runner_v2 = bool(engine.vllm_config.use_v2_model_runner)

    async def rank(self, wanted: Wanted) -> tuple[list[int], list[float]]:
        """Item indices and their scores, best first.

        Raises:
            UserError: nothing to rank; a prompt too long; everything is excluded.
        """
        if self.trie is None:
            raise UserError("this adapter was not trained on next_item: nothing can be ranked")
        longest = len(wanted.prompt_token_ids) + self.trie.depth
        if longest > self.context:
            raise UserError(
                f"the prompt with its answer has up to {longest} tokens, this server reads {self.context}: start it "
                "with a larger --max-model-len, or shorten user_text"
            )
        if wanted.candidates is not None:
            return await self._candidates(self.trie, wanted, wanted.candidates)
        return await self._catalogue(self.trie, wanted)

    async def _catalogue(self, trie: ItemTrie, wanted: Wanted) -> tuple[list[int], list[float]]:
        blocked = trie.excluding(list(wanted.excluded)) if wanted.excluded else None
        beam = Beam(trie, wanted.width, wanted.k, blocked, name="this history")
        driver = BeamDriver([beam], [wanted.prompt_token_ids], [wanted.gate_weights], self.runner_v2)
        while requests := await asyncio.to_thread(driver.requests):
            outputs = await self._ask(requests)
            await asyncio.to_thread(driver.take, outputs)
        titles, scores, _ = beam.ranking()
        excluded = set(wanted.excluded)
        return [_shown(trie, int(title), excluded) for title in titles], scores.tolist()

    async def _candidates(
        self, trie: ItemTrie, wanted: Wanted, candidates: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """Items that share a title are asked once."""
        titles = trie.item_title[list(candidates)].tolist()
        answers = {title: trie.path(int(trie.leaf[title])) for title in dict.fromkeys(titles)}
        requests = [
            (wanted.prompt_token_ids, forced(answer, wanted.gate_weights, self.runner_v2))
            for answer in answers.values()
        ]
        outputs = await self._ask(requests)
        scores = {
            title: read_forced(output, answer) for (title, answer), output in zip(answers.items(), outputs, strict=True)
        }
        ranked = sorted(zip(candidates, titles), key=lambda pair: -scores[pair[1]])[: wanted.k]  # stable
        return [item for item, _ in ranked], [scores[title] for _, title in ranked]

    async def _ask(self, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[Any]:
        """Outputs in the order of the requests; the first error cancels the others."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._final(row, params)) for row, params in requests]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _final(self, row: list[int], params: SamplingParams) -> Any:
        params.output_kind = RequestOutputKind.FINAL_ONLY
        name = f"recllm-{uuid4()}"
        outputs = [out async for out in self.engine.generate(tokens_input(row), params, name, lora_request=self.lora)]
        return outputs[-1]


def _shown(trie: ItemTrie, title: int, excluded: set[int]) -> int:
    """The item that stands for a title: the lowest of those that share it and are not excluded."""
    return next(int(item) for item in trie.items_of(title) if int(item) not in excluded)
