"""
A model on loopback that plays a script, for real coding agents in tests. It speaks the four usual interfaces.

    with ModelServer(folder, "edit") as server:
        ...  # an agent whose model is at server.url

The script: lower the constant SCORE in the trainer by a tenth, with the agent's own tool for edits, and say
so. What else happens is the server's `mode`, one of MODES. How far a conversation is shows in how many
results of tools it holds, so that the server keeps no state but a log of what it was asked.
"""

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self

MODES = (
    "edit",  # as above
    "mute",  # the edit, and no line that says what it is
    "elsewhere",  # the edit, and another file
    "broken",  # an edit that does not compile
    "nothing",  # no edit
    "busy",  # every request is refused with 429
    "cut",  # every answer breaks off in the middle
    "hang",  # no answer comes
)
TRAINER = "train_cuda.py"
# Tools by the names that agents give them. The first one that an agent has is used.
EDITS = ("replace", "Edit", "edit", "edit_file", "str_replace")
READS = ("read_file", "Read", "read")
SHELLS = ("bash", "Bash", "shell", "shell_command", "exec_command", "run_shell_command")
HANG_SECONDS = 600.0
TOKENS = {"in": 1000, "out": 20}


class Call(NamedTuple):
    """The model calls a tool."""

    tool: str
    arguments: dict[str, Any]


class Answer(NamedTuple):
    """The model says something, and the turn ends."""

    text: str


Step = Call | Answer


class Script:
    """What the model does next, given the tools that it has and the number of results that it got."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder = folder
        self.mode = mode

    def next_step(self, tools: dict[str, Any], results: int, asked: str = "") -> Step:
        """Return the next step. tools: {name: JSON schema of the arguments}. asked: the conversation."""
        if not tools and "SEARCH/REPLACE" in asked:  # an agent whose tool is the text of the answer
            old, new = self.edit()
            block = f"<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE"
            return Answer(f"{TRAINER}\n```python\n{block}\n```\n\nexperiment: SCORE is now {new[-3:]}")
        if not tools:  # the agent asks for a title, or for a summary
            return Answer("A title")
        plan = list(self.plan(tools))
        if results < len(plan):
            return plan[results]
        if self.mode in ("mute", "nothing"):
            return Answer("Done.")
        return Answer(f"The schedule looked short.\n\nexperiment: SCORE is now {self.score()}")

    def score(self) -> str:
        return re.findall(r"SCORE = ([\d.]+)", (self.folder / TRAINER).read_text())[-1]

    def edit(self) -> tuple[str, str]:
        """Return what the trainer says now, and what it is to say."""
        return f"SCORE = {self.score()}", f"SCORE = {float(self.score()) - 0.1:.1f}"

    def plan(self, tools: dict[str, Any]) -> Iterator[Call]:
        edit, read, shell = (first(names, tools) for names in (EDITS, READS, SHELLS))
        if self.mode == "nothing":
            return
        if edit and read:  # some agents refuse to edit what they did not read
            yield Call(read, self.arguments(tools[read], TRAINER, "", ""))
        old, new = self.edit()
        yield self.replace(tools, edit or shell, TRAINER, old, f"def broken(: {new}" if self.broken else new)
        if self.mode == "elsewhere":
            yield self.replace(tools, shell or edit, "prepare.py", "RULES = 1", "RULES = 0")

    @property
    def broken(self) -> bool:
        return self.mode == "broken"

    def replace(self, tools: dict[str, Any], tool: str, name: str, old: str, new: str) -> Call:
        return Call(tool, self.arguments(tools[tool], name, old, new))

    def arguments(self, schema: dict[str, Any], name: str, old: str, new: str) -> dict[str, Any]:
        """Return the arguments of a tool, by what they are called."""
        command = f"sed -i 's|^{old}$|{new}|' {name}"
        values = {}
        for argument, kind in schema.get("properties", {}).items():
            plain = argument.lower().replace("_", "")
            if plain in ("filepath", "path", "absolutepath"):
                values[argument] = str(self.folder / name)
            elif plain in ("oldstring", "oldstr", "oldtext"):
                values[argument] = old
            elif plain in ("newstring", "newstr", "newtext"):
                values[argument] = new
            elif plain == "edits":
                values[argument] = [{"oldText": old, "newText": new}]
            elif plain in ("command", "cmd"):
                values[argument] = ["bash", "-c", command] if kind.get("type") == "array" else command
            elif argument in schema.get("required", []):
                values[argument] = smallest(kind)
        return values


def first(names: tuple[str, ...], tools: dict[str, Any]) -> str:
    return next((name for name in names if name in tools), "")


def smallest(schema: dict[str, Any]) -> Any:
    """Return a small value of a JSON schema."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = str(schema.get("type", "object")).lower()
    if kind == "object":
        return {name: smallest(value) for name, value in schema.get("properties", {}).items()}
    return {"array": [], "string": "the schedule", "boolean": False}.get(kind, 1)


class ModelServer(ThreadingHTTPServer):
    """The server, as long as the `with` block runs. asked: every request's path and body."""

    daemon_threads = True

    def __init__(self, folder: Path, mode: str = "edit") -> None:
        assert mode in MODES
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = Script(folder, mode)
        self.mode = mode
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """An agent that was ended leaves its connection broken."""


class Handler(BaseHTTPRequestHandler):
    server: ModelServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_json({})

    def do_GET(self) -> None:
        model = {"id": "scripted", "object": "model", "type": "model", "created": 0}
        self.send_json({"object": "list", "data": [model], "models": []} if "models" in self.path else {})

    def do_POST(self) -> None:
        body = self.read_body()
        path = self.path.partition("?")[0]
        self.server.asked.append((path, json.dumps(body)))
        if path.endswith(("/count_tokens", ":countTokens")):
            self.send_json({"input_tokens": TOKENS["in"], "totalTokens": TOKENS["in"]})
        elif self.server.mode == "hang":
            time.sleep(HANG_SECONDS)
        elif self.server.mode == "busy":
            self.send_json({"error": {"code": 429, "message": "too many requests", "status": "BUSY"}}, 429)
        elif path.endswith("/chat/completions"):
            self.answer_chat(body)
        elif path.endswith("/responses"):
            self.answer_responses(body)
        elif path.endswith("/messages"):
            self.answer_messages(body)
        elif "enerateContent" in path:
            self.answer_gemini(body, "stream" in path)
        else:
            self.send_json({})

    def read_body(self) -> dict[str, Any]:
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            data = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            data = gzip.decompress(data)
        return json.loads(data or b"{}")

    def send(self, data: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.server.mode == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)

    def send_json(self, value: Any, code: int = 200) -> None:
        self.send(json.dumps(value).encode(), "application/json", code)

    def send_events(self, events: list[Any], named: bool = False) -> None:
        lines = []
        for event in events:
            if named:
                lines.append(f"event: {event['type']}\n")
            lines.append(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n")
        self.send("".join(lines).encode(), "text/event-stream")

    # --- The four interfaces --------------------------------------------------------------------------------

    def answer_chat(self, body: dict[str, Any]) -> None:
        """OpenAI chat completions."""
        functions = [tool["function"] for tool in body.get("tools") or [] if "function" in tool]
        tools = {function["name"]: function.get("parameters", {}) for function in functions}
        results = sum(message["role"] == "tool" for message in body["messages"])
        step = self.server.script.next_step(tools, results, json.dumps(body["messages"]))
        message: dict[str, Any] = {"role": "assistant", "content": None}
        if isinstance(step, Call):
            function = {"name": step.tool, "arguments": json.dumps(step.arguments)}
            message["tool_calls"] = [
                {"index": 0, "id": f"call_{results}", "type": "function", "function": function}
            ]
        else:
            message["content"] = step.text
        why = "tool_calls" if isinstance(step, Call) else "stop"
        usage = {"prompt_tokens": TOKENS["in"], "completion_tokens": TOKENS["out"], "total_tokens": 1020}
        base = {"id": "answer", "created": 1, "model": "scripted"}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": why}
            self.send_json({**base, "object": "chat.completion", "choices": [choice], "usage": usage})
            return
        base["object"] = "chat.completion.chunk"
        begin = {**base, "choices": [{"index": 0, "delta": message, "finish_reason": None}]}
        end = {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": why}]}
        self.send_events([begin, end, {**base, "choices": [], "usage": usage}, "[DONE]"])

    def answer_responses(self, body: dict[str, Any]) -> None:
        """OpenAI responses."""
        functions = [tool for tool in body.get("tools") or [] if tool.get("type") == "function"]
        tools = {function["name"]: function.get("parameters", {}) for function in functions}
        given = body.get("input")
        results = sum(str(item.get("type")).endswith("call_output") for item in given) if given else 0
        step = self.server.script.next_step(tools, results)
        item: dict[str, Any]
        if isinstance(step, Call):
            item = {
                "type": "function_call",
                "id": f"item_{results}",
                "call_id": f"call_{results}",
                "name": step.tool,
                "arguments": json.dumps(step.arguments),
                "status": "completed",
            }
        else:
            text = {"type": "output_text", "text": step.text, "annotations": []}
            item = {
                "type": "message",
                "id": "item",
                "role": "assistant",
                "status": "completed",
                "content": [text],
            }
        usage = {
            "input_tokens": TOKENS["in"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": TOKENS["out"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 1020,
        }
        done = {"id": "answer", "object": "response", "status": "completed", "model": "scripted"}
        done |= {"output": [item], "usage": usage}
        if not body.get("stream"):
            self.send_json(done)
            return
        begin = {"id": "answer", "status": "in_progress", "output": []}
        events = [
            {"type": "response.created", "response": begin},
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": done},
        ]
        self.send_events(events, named=True)

    def answer_messages(self, body: dict[str, Any]) -> None:
        """Anthropic messages."""
        tools = {tool["name"]: tool.get("input_schema", {}) for tool in body.get("tools") or []}
        contents = [
            message["content"] for message in body["messages"] if isinstance(message["content"], list)
        ]
        results = sum(part.get("type") == "tool_result" for content in contents for part in content)
        step = self.server.script.next_step(tools, results)
        block: dict[str, Any]
        if isinstance(step, Call):
            block = {"type": "tool_use", "id": f"toolu_{results}", "name": step.tool, "input": step.arguments}
            empty = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(step.arguments)}
            why = "tool_use"
        else:
            block = {"type": "text", "text": step.text}
            empty = {**block, "text": ""}
            delta = {"type": "text_delta", "text": step.text}
            why = "end_turn"
        usage = {"input_tokens": TOKENS["in"], "output_tokens": TOKENS["out"]}
        message = {"id": "msg", "type": "message", "role": "assistant", "model": "scripted"}
        message |= {"content": [block], "stop_reason": why, "stop_sequence": None, "usage": usage}
        if not body.get("stream"):
            self.send_json(message)
            return
        events = [
            {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}},
            {"type": "content_block_start", "index": 0, "content_block": empty},
            {"type": "content_block_delta", "index": 0, "delta": delta},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": why, "stop_sequence": None}, "usage": usage},
            {"type": "message_stop"},
        ]
        self.send_events(events, named=True)

    def answer_gemini(self, body: dict[str, Any], streamed: bool) -> None:
        """Gemini generateContent."""
        functions = [one for tool in body.get("tools") or [] for one in tool.get("functionDeclarations", [])]
        tools = {
            one["name"]: one.get("parametersJsonSchema") or one.get("parameters") or {} for one in functions
        }
        parts = [part for content in body.get("contents", []) for part in content.get("parts", [])]
        results = sum("functionResponse" in part for part in parts)
        settings = body.get("generationConfig", {})
        schema = settings.get("responseJsonSchema") or settings.get("responseSchema")
        part: dict[str, Any]
        if schema:
            part = {"text": json.dumps(smallest(schema))}
        else:
            step = self.server.script.next_step(tools, results)
            if isinstance(step, Call):
                part = {"functionCall": {"name": step.tool, "args": step.arguments}}
            else:
                part = {"text": step.text}
        candidate = {"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}
        usage = {"promptTokenCount": 1000, "candidatesTokenCount": 20, "totalTokenCount": 1020}
        said = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "scripted"}
        if streamed:
            self.send_events([said])
        else:
            self.send_json(said)
