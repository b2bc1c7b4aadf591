"""the messages of CRIU's images that natkeep reads: fields by number, as CRIU's *.proto say.

Rule: only what is looked at is named; any other field is skipped, or damage (see protobuf.py).
"""

from __future__ import annotations

from natkeep.checkpoint.protobuf import Message

INVENTORY_ENTRY = Message(
    "inventory_entry",
    numbers={1: "img_version", 10: "tcp_close", 11: "network_lock_method"},
    octets={3: "root_ids", 12: "plugins_entry", 13: "dump_criu_run_id"},
    optional="tcp_close network_lock_method root_ids plugins_entry dump_criu_run_id",
)
# These two are looked into only since their lengths, when too long, take in what follows them.
PLUGINS = Message("plugins_entry", numbers={}, unknown_below=13)
IP_OPTIONS = Message("ip_opts_entry", numbers={}, unknown_below=16)
_NAMESPACES = {5: "pid_ns_id", 6: "net_ns_id", 9: "mnt_ns_id"}
ROOT_IDS = Message("root_ids", numbers=_NAMESPACES, optional=" ".join(_NAMESPACES.values()))
TASK_IDS = Message(
    "task_kobj_ids_entry", numbers=_NAMESPACES, optional=" ".join(_NAMESPACES.values())
)
PSTREE_ENTRY = Message("pstree_entry", numbers={1: "pid"})
# One of the many is there, by the kind of the file: CRIU 4.2.1 has 3 to 21, of a message each.
_FILE_KINDS = {field: "isk" if field == 4 else f"kind_{field}" for field in range(3, 64)}
FILE_ENTRY = Message(
    "file_entry",
    numbers={1: "type", 2: "id"},
    octets=_FILE_KINDS,
    optional=" ".join(_FILE_KINDS.values()),
    unknown_below=0,
)
FDINFO_ENTRY = Message("fdinfo_entry", numbers={1: "id", 2: "flags", 3: "type", 4: "fd"})
SOCKET_ENTRY = Message(
    "inet_sk_entry",
    numbers={
        **{1: "id", 2: "ino", 3: "family", 4: "type", 5: "proto", 6: "state", 7: "src_port"},
        **{8: "dst_port", 9: "flags", 10: "backlog", 15: "v6only", 18: "ns_id", 19: "shutdown"},
    },
    octets={13: "fown", 14: "opts", 16: "ip_opts", 17: "ifname", 20: "tcp_opts"},
    words={11: "src_addr", 12: "dst_addr"},
    optional="v6only ip_opts ifname ns_id shutdown tcp_opts",
)
SOCKET_OPTIONS = Message(
    "sk_opts_entry", numbers={}, octets={15: "so_bound_dev"}, optional="so_bound_dev"
)
STREAM_ENTRY = Message(
    "tcp_stream_entry",
    numbers={1: "inq_len", 3: "outq_len", 12: "unsq_len"},
    optional="unsq_len",
)
REGULAR_FILE = Message(
    "reg_file_entry",
    numbers={1: "id", 2: "flags", 8: "size", 9: "ext", 10: "mode"},
    octets={5: "fown", 6: "name"},
    optional="size ext mode",
    wide=frozenset({8}),
)
UNIX_SOCKET = Message(
    "unix_sk_entry",
    numbers={
        **{1: "id", 2: "ino", 3: "type", 4: "state", 5: "flags", 6: "uflags", 7: "backlog"},
        **{8: "peer", 15: "deleted"},
    },
    octets={9: "fown", 10: "opts", 11: "name", 14: "name_dir"},
    optional="deleted name_dir",
)
REMAP = Message("remap_file_path_entry", numbers={1: "orig_id", 2: "remap_id"})
