"""A language model writes the report of a lesion: any server with OpenAI's chat completions.

LesionDiffusion (Tian et al., MICCAI 2025) asks a model for what the user does not say. Its answer is believed only as
far as it is checked: form, words, organ, size. What the user says wins, and what the model leaves out is drawn by the
rules of `common/lesion_reports.py`, which also step in when the server fails.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from .io import CaseError
from .lesion_reports import SCHEMA, LesionReport, check_wish, complete, read_strictly, unknown_values
from .lesion_words import CAVITY, cavities_of

logger = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # s, whatever a server asks for
MOST_BYTES = 2**20
SYSTEM = (
    "You are an expert in radiology who describes lesions for synthetic CT. Answer with one JSON object and nothing "
    "else. It fits this JSON Schema, and has one lesion with organ, lesion, size_mm and every attribute: "
)


class ReportWriterError(RuntimeError):
    """The server gave no usable report; the message says why."""


class _TryAgainError(Exception):
    """A fault that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class OpenAIReportWriter:
    """Completes reports through a server with OpenAI's chat completions, hosted or local.

    Args:
        base_url: of the server, with or without ``/v1`` or the whole endpoint; None reads ``OPENAI_BASE_URL``, or is
            OpenAI's.
        model: name; None reads ``OPENAI_MODEL``.
        key: secret; None reads ``OPENAI_API_KEY``, as a config should; local servers need none. It is never logged.
        timeout: seconds for one answer.
        retries: further tries after a fault of the server or an answer that does not pass, in all.
        fallback: whether the rules write the report when all tries failed; else that is an error.
    """

    pause = 1.0  # s before the second try; it doubles

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        fallback: bool = True,
    ) -> None:
        if timeout <= 0 or retries < 0:
            raise ValueError(f"timeout {timeout} must be above 0 and retries {retries} not below")
        self.url = endpoint(base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        self.model = model or os.environ.get("OPENAI_MODEL", "")
        if not self.model:
            raise ValueError("no language model is named: give model, or set OPENAI_MODEL")
        self._key = key if key is not None else os.environ.get("OPENAI_API_KEY", "")
        self.timeout, self.retries, self.fallback = timeout, retries, fallback
        self.description = f"OpenAIReportWriter(url={self.url!r}, model={self.model!r})"

    def __call__(
        self,
        wish: LesionReport,
        *,
        seed: int,
        present: Collection[int] | None = None,
        extent_mm: Sequence[float] | None = None,
    ) -> LesionReport:
        """Complete a report; arguments as `RuleReportWriter`. The seed is passed on: few servers keep to it."""
        wish = check_wish(wish, present, extent_mm)
        rng = np.random.default_rng(seed)
        try:
            report = complete(self.written(wish, seed, extent_mm), rng, present, extent_mm)
            return replace(report, source="llm")
        except ReportWriterError as error:
            if not self.fallback:
                raise
            logger.warning(f"{error}; the rules write this report of a lesion in {wish.organ}")
            return complete(wish, rng, present, extent_mm)

    def written(self, wish: LesionReport, seed: int, extent_mm: Sequence[float] | None) -> LesionReport:
        """The model's report with the user's words in it; asks again, with the reasons, until one passes."""
        messages = [{"role": "system", "content": SYSTEM + json.dumps(SCHEMA)}, _question(wish, extent_mm)]
        reason = ""
        for attempt in range(self.retries + 1):
            try:
                answer = self.ask(messages, seed + attempt)
            except _TryAgainError as error:
                reason = str(error)
                if attempt < self.retries:
                    wait = self.pause * 2**attempt if error.wait is None else error.wait
                    time.sleep(min(wait, LONGEST_WAIT))
                continue
            try:
                return accept(answer, wish, extent_mm)
            except CaseError as error:
                reason = f"its answer does not pass ({error})"
                again = f"That cannot be used: {error}. Answer again with the whole corrected JSON object."
                messages = [*messages[:2], {"role": "assistant", "content": answer}, {"role": "user", "content": again}]
        raise ReportWriterError(self.hidden(f"{self.model} at {self.url}: {reason}, {self.retries + 1} tries"))

    def ask(self, messages: Sequence[Mapping[str, str]], seed: int) -> str:
        """One request -> the model's text."""
        body = {"model": self.model, "messages": messages, "temperature": 0.7, "seed": seed, "max_tokens": 1000}
        body["response_format"] = {"type": "json_object"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if self._key:  # not for another host, should the server redirect
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = json.loads(_read(response, time.monotonic() + self.timeout))
            text = content["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise self.refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgainError(
                f"it does not answer ({getattr(error, 'reason', error) or type(error).__name__})"
            ) from None
        except (ValueError, LookupError, TypeError) as error:
            raise _TryAgainError(f"it does not answer as OpenAI's chat completions do ({error!r:.100})") from None
        return text if isinstance(text, str) else ""

    def refusal(self, error: urllib.error.HTTPError) -> Exception:
        """What follows from a status: faults of the server may pass, ours do not."""
        with error:
            said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
        reason = f"status {error.code}, {said or error.reason}"
        if error.code in (408, 425, 429) or error.code >= 500:
            wait = re.fullmatch(r"\d+(\.\d+)?", error.headers.get("Retry-After", "").strip())
            return _TryAgainError(reason, float(wait[0]) if wait else None)
        fix = {401: "check OPENAI_API_KEY", 403: "check OPENAI_API_KEY", 404: "check base_url and model"}
        advice = fix.get(error.code, "check base_url, model and what the server supports")
        return ReportWriterError(self.hidden(f"{self.model} at {self.url}: {reason}: {advice}"))

    def hidden(self, text: str) -> str:
        """A text without the key, which some servers repeat."""
        return text.replace(self._key, "***") if self._key else text


def endpoint(base_url: str) -> str:
    """The address of chat completions, however much of it is given.

    Example:
        >>> endpoint("http://localhost:11434"), endpoint("https://api.groq.com/openai/v1/")
        ('http://localhost:11434/v1/chat/completions', 'https://api.groq.com/openai/v1/chat/completions')
    """
    parts = urlsplit(base_url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError("base_url must be http://host/v1 or https://host/v1, without a name or password in it")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, f"{path}/chat/completions", parts.query, ""))


def accept(answer: str, wish: LesionReport, extent_mm: Sequence[float] | None = None) -> LesionReport:
    """Read a model's answer and put the user's words into it; a CaseError tells all that is wrong with it."""
    found = re.search(r"\{.*\}", answer, re.DOTALL)  # without code fences and small talk
    try:
        content = json.loads(found[0] if found else answer)
    except ValueError as error:
        raise CaseError(f"it is no JSON object, or was cut off ({error})") from None
    if not isinstance(content, Mapping):
        raise CaseError(f"it is a {type(content).__name__}, expected a JSON object")
    reports = read_strictly(content, "answer")
    said = reports[0]
    if len(reports) > 1 or said.organ not in (wish.organ, *wish.organs):
        came = ", ".join(report.organ for report in reports)
        raise CaseError(f"asked was one lesion, in the organ {wish.organ}, came {came}")
    own = {key: value for key, value in said.attributes.items() if key not in wish.attributes}
    problems = unknown_values(replace(said, attributes=own))
    problems += ["size_mm is missing"] * (not said.size_mm and not wish.size_mm)
    if problems:
        raise CaseError("; ".join(problems))
    return check_wish(
        replace(
            wish,
            lesion=wish.lesion or said.lesion,
            attributes={**own, **wish.attributes},
            size_mm=wish.size_mm or said.size_mm,
            location=wish.location or said.location,
        ),
        extent_mm=extent_mm,
    )


def _question(wish: LesionReport, extent_mm: Sequence[float] | None) -> dict[str, str]:
    """What the model is asked for."""
    given = {"lesion": wish.lesion, "size_mm": wish.size_mm, "location": wish.location, **wish.attributes}
    given = {key: value for key, value in given.items() if value}
    lines = [f"Describe one plausible lesion in the organ {wish.organ!r}."]
    lines += [f"This is given, keep it: {json.dumps(given)}."] * bool(given)
    if extent_mm is not None:
        lines.append(f"size_mm must be smaller than the organ, which measures {[round(e) for e in extent_mm]} mm.")
    lines.append(f"Use the words of the schema alone; {CAVITY} is {' or '.join(cavities_of(wish.organ))}.")
    return {"role": "user", "content": " ".join(lines)}


def _read(response: Any, deadline: float) -> bytes:
    """The body; a server that sends byte by byte does not get beyond the deadline either."""
    content = b""
    while chunk := response.read1(65536):
        content += chunk
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
        if len(content) > MOST_BYTES:
            raise OSError("it sends far more than a report")
    return content
