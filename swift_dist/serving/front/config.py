"""HAProxy's configuration: two listeners, and as many equal backends as versions may run at the same time.

    clients -> public (TCP; stream.lua completes streams that broke) -> api (HTTP: keys, limits, routing) -> v0, v1, ...
                                                                                                       \\-> control

What changes while it runs (maps, servers) is `tables`' and `runtime`'s; nothing here depends on the state but the
address of the control API. Of the keys only SHA-256 digests are written: a look-up by digest tells nothing about a key
through the time it takes, since whoever guesses cannot steer the digest of a guess towards one that is stored.
"""

from __future__ import annotations

import json
import os

from swift_dist.serving.front.options import FrontOptions
from swift_dist.serving.front.tables import DRAWS, Server, Tables

TEXT = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
EMBEDDINGS = "/v1/embeddings"
GENERATED = (*TEXT, EMBEDDINGS, "/tokenize", "/detokenize")
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
CONTROL = ("/health", "/metrics", "/v1/models", *ADMIN)  # and a model's own path below /v1/models/
ADMIN_SOCKET, API_SOCKET, METRICS_SOCKET = "admin.sock", "api.sock", "metrics.sock"
MODELS, SHARES, SERVERS = "models.map", "shares.map", "servers.map"
API_KEYS, ADMIN_KEYS = "api_keys.sha256", "admin_keys.sha256"
VERSION_HEADER = "x-swift-version"

_HEADER_BYTES = 32 << 10
_LONGEST_NAME = 512
_KEPT_BUFFERS = 64  # of each thread
_THREADS = 4  # one carries some 10,000 streamed tokens a second
_RETRIED = "conn-failure empty-response junk-response 500 502 503 504"
_CONNECT_SECONDS = 2
_FIN_SECONDS = 3  # without progress, once one side has closed: clients that idle do not close
# A node that vanished is noticed in 2 + 3 seconds, however long its replica has been silent; one that computes is not.
_KEEPALIVE = "option srvtcpka\n    srvtcpka-idle 2s\n    srvtcpka-intvl 1s\n    srvtcpka-cnt 3"
_CHECK = "check inter 1s fastinter 500ms downinter 500ms fall 2 rise 1 observe layer4 error-limit 1 on-error mark-down"


def render(options: FrontOptions, control: tuple[str, int], tables: Tables, slots: int, lua: str) -> str:
    """The text of ``haproxy.cfg``. Paths in it are relative to the folder that HAProxy is started in.

    Args:
        options: the front's keys.
        control: host and port of the control API.
        tables: what it starts with.
        slots: number of backends for versions.
        lua: path of stream.lua.
    """
    parts = [_global(options, lua), _defaults(options), _public(options), _api(options), _versions(options)]
    parts += [_slot(options, f"v{number}", tables.slots.get(f"v{number}", {})) for number in range(slots)]
    return "\n".join([*parts, _control(control), _metrics()])


def maps(tables: Tables) -> dict[str, str]:
    """The texts of the files of its maps."""
    contents = {MODELS: tables.models, SHARES: tables.shares, SERVERS: tables.labels}
    return {name: "".join(f"{key} {value}\n" for key, value in rows.items()) for name, rows in contents.items()}


def server_words(options: FrontOptions, server: Server) -> str:
    """The words that define a server of a version, but its name.

    Its health is whether its port can be reached: the kernel answers that however busy an engine is. Whether the
    engine behind it is well is found out by its replica.
    """
    words = f"{_address(server.replica.host, server.replica.port)} {_CHECK} maxconn {options.max_concurrent}"
    return f"{words} backup" if server.spare else words


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> str:
    """An error as OpenAI's API words it."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def _refuse(status: int, message: str, kind: str, code: str | None = None, **more: str) -> str:
    """A rule's action. `message` may hold sample expressions of HAProxy. more: param, headers."""
    body = _quoted(error_body(message, kind, code, more.get("param")))
    return (
        f"http-request return status {status} content-type application/json lf-string {body}{more.get('headers', '')}"
    )


def _quoted(text: str) -> str:
    assert "'" not in text, text  # within strong quotes nothing is special but their end
    return f"'{text}'"


def _retry_after(options: FrontOptions) -> str:
    return f" hdr Retry-After {options.retry_after}"


def _global(options: FrontOptions, lua: str) -> str:
    # A request is retried from a copy of its buffer, so a buffer holds a whole one. Their memory is kept for the next
    # ones: giving it back and taking it again cost ten times the time of everything else.
    buffer = options.max_request_bytes + 2 * _HEADER_BYTES
    return f"""# Written by swift-dist. Keys are digests; maps and servers change at run time.
global
    stats socket unix@{ADMIN_SOCKET} mode 600 level admin
    stats timeout 1m
    nbthread {min(_THREADS, os.cpu_count() or 1)}
    fd-hard-limit 65536
    noreuseport
    tune.bufsize {buffer}
    tune.memory.hot-size {_KEPT_BUFFERS * buffer}
    tune.maxrewrite 8192
    lua-load-per-thread {json.dumps(lua)}
"""


def _defaults(options: FrontOptions) -> str:
    busy = "No replica could take this request in time. Try again later."
    failed = "The replicas that were given this request failed before they answered."
    slow = "The model did not answer within the time limit."
    # HAProxy answers what its parser refuses with a page of its own, whatever is said here.
    errors = [
        (400, "The request is not valid HTTP.", "invalid_request_error", "bad_request", ""),
        (408, "The request did not arrive in time.", "invalid_request_error", "request_timeout", ""),
        (500, "The front failed.", "server_error", "internal_error", ""),
        (502, failed, "server_error", "replica_failed", _retry_after(options)),
        (503, busy, "server_error", "overloaded", _retry_after(options)),
        (504, slow, "server_error", "timeout", ""),
    ]
    lines = "\n".join(
        f"    http-error status {status} content-type application/json string "
        f"{_quoted(error_body(message, kind, code))}{headers}"
        for status, message, kind, code, headers in errors
    )
    return f"""defaults http
    mode http
    option http-no-delay
    timeout connect {_CONNECT_SECONDS}s
    timeout client {options.timeout_client}s
    timeout http-request {options.timeout_client}s
    timeout http-keep-alive {options.timeout_client}s
    timeout server {options.timeout_answer}s
    timeout queue {options.timeout_queue}s
{lines}
"""


def _public(options: FrontOptions) -> str:
    # How long anything may take is the api's to say: it ends connections, and with them these.
    return f"""defaults tcp
    mode tcp
    timeout connect {_CONNECT_SECONDS}s

listen public from tcp
    bind {_address(options.host, options.port)}
    option clitcpka
    timeout client 7d
    timeout server 7d
    timeout client-fin {_FIN_SECONDS}s
    timeout server-fin {_FIN_SECONDS}s
    filter lua.complete_streams
    server api unix@{API_SOCKET} send-proxy-v2
"""


def _api(options: FrontOptions) -> str:
    model = "%[var(txn.model),json(utf8s)]"
    limit = options.max_request_bytes
    refusal = error_body(f"A request may have {limit} bytes.", "invalid_request_error", "request_too_large", "body")
    return f"""frontend api from http
    bind unix@{API_SOCKET} accept-proxy mode 600 proto h1
    log stdout len 8192 format raw local0 info
    log-format {_quoted(_log_format())}
    # Whatever is refused, a connection that ends while the client still sends may lose the answer.
    http-request wait-for-body time {options.timeout_client}s
    http-request set-var(txn.path) path
    http-request set-var(txn.id) uuid
    http-request set-var(txn.id) req.hdr(x-request-id) if {{ req.hdr(x-request-id) -m reg ^[A-Za-z0-9._:-]{{1,128}}$ }}
    http-request set-header x-request-id %[var(txn.id)]
    http-after-response set-header x-request-id %[var(txn.id)] if {{ var(txn.id) -m found }}
    acl generated path {" ".join(GENERATED)}
    acl admin path {" ".join(ADMIN)}
    acl control path {" ".join(CONTROL)}
    acl control path -m beg /v1/models/
    {_refuse(431, "The headers are too long.", "invalid_request_error", "headers_too_large")} if {{ req.hdrs,length gt {_HEADER_BYTES} }}
    http-request allow if {{ path /health }}
{_keys(options)}
    {_refuse(404, "There is no such path.", "invalid_request_error", "not_found")} if !generated !control
    http-request set-var-fmt(txn.refusal) {_quoted(refusal)}
    http-request use-service lua.too_large if {{ req.hdr_val(content-length) gt {limit} }}
    http-request allow if !generated
    {_refuse(405, "Use POST.", "invalid_request_error", "method_not_allowed", headers=" hdr Allow POST")} if !METH_POST
    {_refuse(415, "Send application/json.", "invalid_request_error", "unsupported_content_type")} if !{{ req.hdr(content-type) -m reg -i ^application/([a-z.-]+[+])?json(\\s*;.*)?$ }}
    http-request use-service lua.too_large if {{ req.body_len gt {limit} }}
    http-request set-var(txn.model) req.body,json_query('$.model')
    http-request set-var(txn.stream) bool(true) if {{ req.body,json_query('$.stream') -m bool }}
{_lookup()}
    http-request lua.read_model if {{ var(txn.route) -m int lt 0 }} or !{{ var(txn.model) -m found }}
{_lookup()}
    {_refuse(400, "The body is not JSON, or names no model.", "invalid_request_error", "missing_model", param="model")} if !{{ var(txn.model) -m found }} {{ var(txn.route) -m int lt 0 }}
    {_refuse(404, "There is no such model.", "invalid_request_error", "model_not_found", param="model")} if {{ var(txn.route) -m int lt 0 }} {{ var(txn.model),length gt {_LONGEST_NAME} }}
    {_refuse(404, f"The model `{model}` does not exist.", "invalid_request_error", "model_not_found", param="model")} if {{ var(txn.route) -m int lt 0 }}
{_tasks()}
    http-request set-var(txn.draw) rand({DRAWS}),add(txn.route)
    http-request set-var(txn.slot) var(txn.draw),map_int({SHARES})
    {_refuse(503, "No replica of this model is ready. Try again later.", "server_error", "no_replica_ready", headers=_retry_after(options))} if !{{ var(txn.slot),nbsrv gt 0 }}
    http-request del-header authorization
    use_backend control if !generated
    use_backend %[var(txn.slot)]
"""  # noqa: E501


def _tasks() -> str:
    """A model answers what it is for; what engines say to the rest differs, and may not be OpenAI's shape."""
    kind = ("invalid_request_error", "unsupported_task")
    text = _refuse(400, f"This model is served for embeddings: send POST {EMBEDDINGS}.", *kind, param="model")
    vectors = _refuse(400, f"This model is served for text: it does not answer {EMBEDDINGS}.", *kind, param="model")
    return f"""    acl embeds var(txn.route),div({DRAWS}),odd -m bool
    {text} if embeds {{ path {" ".join(TEXT)} }}
    {vectors} if !embeds {{ path {EMBEDDINGS} }}"""


def _lookup() -> str:
    return f"""    http-request set-var(txn.key) str(-)
    http-request set-var(txn.key) var(txn.model),hex if {{ var(txn.model) -m found }}
    http-request set-var(txn.route) var(txn.key),map_str_int({MODELS},-1)"""


def _keys(options: FrontOptions) -> str:
    """Who may go on. Adapters are loaded with an admin key only; the control API asks for its own beside it."""
    lines = ["http-request set-var(txn.digest) http_auth_bearer,sha2(256),hex"]
    wrong = _refuse(
        401,
        "Incorrect API key provided. Send it as: Authorization: Bearer KEY.",
        "invalid_request_error",
        "invalid_api_key",
        headers=" hdr WWW-Authenticate Bearer",
    )
    if options.admin_keys:
        lines.append(f"acl is_admin var(txn.digest) -m str -f {ADMIN_KEYS}")
        lines.append(f"{wrong} if admin !is_admin")
    else:
        closed = "Adapters cannot be loaded through this address: the deployment has no admin keys."
        lines.append(f"{_refuse(403, closed, 'permission_error', 'no_admin_keys')} if admin")
    if options.api_keys or options.api_keys_variable:
        lines.append(f"acl is_user var(txn.digest) -m str -f {API_KEYS}")
        lines.append(f"{wrong} if !is_user" + (" !is_admin" if options.admin_keys else ""))
    return "\n".join(f"    {line}" for line in lines)


def _log_format() -> str:
    """A line of JSON a request. Neither prompts nor keys; whatever a client chose is escaped."""
    text = {
        "id": "var(txn.id)",
        "path": "var(txn.path),bytes(0,200),json(utf8s)",
        "model": f"var(txn.model),bytes(0,{_LONGEST_NAME}),json(utf8s)",
        "version": f"srv_name,map({SERVERS}),word(1,|)",
        "replica": f"srv_name,map({SERVERS}),word(2,|)",
    }
    # milliseconds: until a replica was free, until the first byte, until the end
    number = {"status": "%ST", "queue_ms": "%Tw", "first_byte_ms": "%Tr", "ms": "%Ta", "bytes": "%B"}
    fields = ['"time": %Ts.%ms', '"client": "%ci"', '"method": "%HM"']
    fields += [f'"{key}": "%[{sample}]"' for key, sample in text.items()]
    fields += [f'"{key}": {word}' for key, word in number.items()]
    fields += ['"retries": "%rc"', '"ended": "%ts"']  # +: at another replica; two letters: how (HAProxy, 8.5)
    return "{" + ", ".join(fields) + "}"


def _versions(options: FrontOptions) -> str:
    """What all slots have in common. A connection serves one request: idle ones would be found dead only when used."""
    return f"""defaults versions from http
    balance leastconn
    option http-server-close
    option abortonclose
    option allbackups
    option redispatch 1
    retries {options.retries}
    retry-on {_RETRIED}
    {_KEEPALIVE}
    timeout check 2s
"""


def _slot(options: FrontOptions, slot: str, servers: dict[str, Server]) -> str:
    full = "Too many requests wait for this model. Try again later."
    full_rule = _refuse(429, full, "rate_limit_error", "rate_limit_exceeded", headers=_retry_after(options))
    lines = "".join(f"    server {name} {server_words(options, server)}\n" for name, server in servers.items())
    return f"""backend {slot} from versions
    {full_rule} if {{ avg_queue({slot}) ge {options.max_waiting} }}
    http-request set-timeout server {options.timeout_stream}s if {{ var(txn.stream) -m bool }}
    http-response set-header {VERSION_HEADER} %[srv_name,map({SERVERS}),word(1,|)]
{lines}"""


def _control(control: tuple[str, int]) -> str:
    message = "The control API of this deployment does not answer. Try again later."
    gone = _quoted(error_body(message, "server_error", "control_unavailable"))
    return f"""backend control from http
    http-error status 503 content-type application/json string {gone} hdr Retry-After 2
    option abortonclose
    retry-on conn-failure
    server control {_address(*control)}
"""


def _metrics() -> str:
    return f"""frontend metrics from http
    bind unix@{METRICS_SOCKET} mode 600
    http-request use-service prometheus-exporter
"""
