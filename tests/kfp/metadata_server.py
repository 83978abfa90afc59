"""ML Metadata's gRPC service on its embedded C++ store: every call's bytes go in and out as they are.

    python metadata_server.py HOST:PORT FILE.sqlite

Kubeflow Pipelines' driver and launcher speak to it. One lock and one file: for tests only.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from ml_metadata.metadata_store.pywrap.metadata_store_extension import (  # pyright: ignore[reportMissingImports]
    metadata_store as store_calls,
)
from ml_metadata.proto import (  # pyright: ignore[reportMissingImports]
    metadata_store_pb2,
    metadata_store_service_pb2,
)

CODES = {code.value[0]: code for code in grpc.StatusCode}
THREADS = 8


def opened(path: str) -> Any:
    """The store, its tables made when the file is new."""
    config = metadata_store_pb2.ConnectionConfig()
    config.sqlite.filename_uri = path
    config.sqlite.connection_mode = metadata_store_pb2.SqliteMetadataSourceConfig.READWRITE_OPENCREATE
    options = metadata_store_pb2.MigrationOptions()
    return store_calls.CreateMetadataStore(config.SerializeToString(), options.SerializeToString())


def method(call: Callable[..., Any] | None, store: Any, lock: threading.Lock) -> grpc.RpcMethodHandler:
    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if call is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "the embedded store has no such call")
        with lock:
            response, message, code = call(store, request)
        if code:
            told = message.decode() if isinstance(message, bytes) else message
            context.abort(CODES.get(code, grpc.StatusCode.UNKNOWN), told)
        return response

    return grpc.unary_unary_rpc_method_handler(answer)  # without (de)serializers: bytes


def main(address: str, path: str) -> int:
    store, lock = opened(path), threading.Lock()
    service = metadata_store_service_pb2.DESCRIPTOR.services_by_name["MetadataStoreService"]
    handlers = {one.name: method(getattr(store_calls, one.name, None), store, lock) for one in service.methods}
    server = grpc.server(ThreadPoolExecutor(THREADS))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    server.add_insecure_port(address)
    server.start()
    print(f"ML Metadata on {address}", flush=True)
    server.wait_for_termination()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
