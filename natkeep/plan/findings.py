"""The findings: what was looked at for a move, and what each code that is found means.

    ok    WHAT         it was looked at, and is as a move needs it
    note  CODE WHAT    good to know
    warn  CODE WHAT    it may lose connections
    stop  CODE WHAT    a move would be refused, fail, or carry nothing

Rule: values and words only; `natkeep explain CODE` prints the catalogue. Whether a finding is one
is judged in other files of plan/, by what kernel/ has read. This file must never look at a machine.

Size: over 400 lines, because the catalogue is one table.
"""

from __future__ import annotations

from enum import StrEnum

from natkeep.plan.move import Site
from natkeep.values import dataclass

FULL = 90
"""Per cent of nf_conntrack_max up to which natkeep adds entries."""


class Severity(StrEnum):
    """The first word of a finding's line; see the top of this file."""

    STOP = "stop"
    WARN = "warn"
    NOTE = "note"
    OK = "ok"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a code means, and what to do."""

    severity: Severity
    meaning: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; detail is one clause with the figures and names.

    code: of CATALOGUE; empty where all is well. site: None where it is of no site.
    remedy: what to do just here, where that is more than the catalogue can say.
    """

    code: str
    site: Site | None
    detail: str
    remedy: str = ""

    @property
    def severity(self) -> Severity:
        """That of its code."""
        return CATALOGUE[self.code].severity if self.code else Severity.OK

    def what(self) -> str:
        """Site and detail, as a line says them."""
        return f"{self.site}: {self.detail}" if self.site else self.detail


def ok(site: Site | None, detail: str) -> Finding:
    """Something that was looked at and is well."""
    return Finding("", site, detail)


CATALOGUE = {
    "no-privileges": Explanation(
        Severity.STOP,
        "This process lacks CAP_NET_ADMIN, without which no rule, address or conntrack entry can "
        "be changed.",
        "Run natkeep as root, or give it CAP_NET_ADMIN, and CAP_SYS_ADMIN to enter other "
        "namespaces.",
    ),
    "no-libnftables": Explanation(
        Severity.STOP,
        "libnftables or its Python binding cannot be loaded.",
        "Install the package libnftables1, and pip-nftables or python3-nftables.",
    ),
    "no-nf-tables": Explanation(
        Severity.STOP,
        "The kernel did not answer a question about nf_tables.",
        "Load the module nf_tables, or use a kernel that has it.",
    ),
    "forwarding-off": Explanation(
        Severity.STOP,
        "A gateway passes packets on, and so does a host between it and the destination. "
        "Forwarding is off here.",
        "sysctl -w net.ipv4.ip_forward=1 (net.ipv6.conf.all.forwarding=1 for IPv6), or name the "
        "namespace that is the gateway.",
    ),
    "conntrack-full": Explanation(
        Severity.STOP,
        f"The connection table is over {FULL} % full; it would take neither natkeep's entries nor "
        "anybody else's new connections.",
        "Raise net.netfilter.nf_conntrack_max, or find out what fills it.",
    ),
    "flowtable": Explanation(
        Severity.WARN,
        "A flowtable takes established connections past all rules; one that is in it is not "
        "translated before it has left it. `prepare` refuses a kept connection that is.",
        "Leave the kept connections out of the flowtable's rule.",
    ),
    "legacy-iptables": Explanation(
        Severity.WARN,
        "iptables-legacy has tables here beside nf_tables, which does not show them: natkeep does "
        "not follow kept packets through rules there. Its NAT, at priorities -100 and 100, comes "
        "behind natkeep's.",
        "See that `iptables-legacy-save` has no rule that drops what is between NEW and the peers; "
        "or use iptables-nft.",
    ),
    "bridge-netfilter": Explanation(
        Severity.WARN,
        "bridge-nf-call-iptables is on: bridged frames pass the IP hooks too, so a packet may be "
        "translated on the bridge and again on its route.",
        "sysctl -w net.bridge.bridge-nf-call-iptables=0, unless a container engine needs it.",
    ),
    "reverse-path-filter": Explanation(
        Severity.NOTE,
        "rp_filter is strict on a device here: packets whose way back is another device are "
        "dropped without a word. `check` with a --map tells whether that is so for its packets.",
        "Set rp_filter to 2 (loose) where routes are asymmetric.",
    ),
    "xdp": Explanation(
        Severity.WARN,
        "An XDP program is attached to a device here. It sees packets before any rule, and may "
        "answer or redirect them untranslated, as some load balancers and firewalls do.",
        "See that it passes the kept connections on: `ip link show` names it, `bpftool net` too.",
    ),
    "bpf": Explanation(
        Severity.WARN,
        "A BPF program is attached to the traffic control of a device here (tc, tcx or netkit). It "
        "may send packets to another device past all rules and conntrack, as Cilium does with its "
        "eBPF host routing: then nothing is translated here.",
        "`bpftool net` names it. With Cilium: bpf.hostLegacyRouting=true, so that `cilium status` "
        "says Host: Legacy; a destination in a pod's own namespace works either way.",
    ),
    "virtual-servers": Explanation(
        Severity.WARN,
        "IPVS has virtual servers here; it keeps its own table of connections and may take "
        "packets before they are translated.",
        "Do not move connections that IPVS balances at this gateway.",
    ),
    "other-nat": Explanation(
        Severity.NOTE,
        "Other NAT chains are here. natkeep's come first (20 before the usual priorities), and its "
        "entries exist before the first packet, so they do not touch kept connections. One that "
        "translates them already is taken over in mode stateful, and refused in mode stateless.",
        "Nothing.",
    ),
    "not-tracked": Explanation(
        Severity.NOTE,
        "Rules here keep packets from being tracked (`notrack`). Kept connections that they hit "
        "are translated all the same, without conntrack; but their packets are not counted, and a "
        "gateway alone does not see their end, so that `teardown` there asks for --yes.",
        "Nothing.",
    ),
    "helper": Explanation(
        Severity.WARN,
        "A rule assigns kept connections a conntrack helper (FTP, SIP, …). Entries keep the helper "
        "that they have, and get no other. What a helper announces, as a transfer of FTP, is a new "
        "connection to an address inside: it does not follow.",
        "Nothing, if no such connections are announced; else end these sessions before the move.",
    ),
    "zone": Explanation(
        Severity.NOTE,
        "A rule assigns kept packets a conntrack zone. An entry stays in the zone that it is in; "
        "where there is none yet, as at a destination, the rules carry what comes in another zone, "
        "and `status` there may take the connection for one-way.",
        "Nothing.",
    ),
    "synproxy": Explanation(
        Severity.WARN,
        "A SYNPROXY takes what conntrack calls invalid of a kept connection's tuple, and drops it. "
        "Kept packets are established by their entries; without these (`conntrack -F`, "
        "nf_conntrack_tcp_loose=0) they would be dropped until a repair.",
        "Accept the kept tuples in front of that rule while they live.",
    ),
    "tproxy": Explanation(
        Severity.STOP,
        "A rule gives kept packets to a socket of this host (TPROXY). They would not go on.",
        "Leave the kept connections out of that rule.",
    ),
    "queued": Explanation(
        Severity.WARN,
        "A rule gives kept packets to a program (NFQUEUE), which may drop or change them; what "
        "it knows of connections is not translated.",
        "See that the program lets them pass with NEW in place of OLD.",
    ),
    "no-pick-up": Explanation(
        Severity.NOTE,
        "nf_conntrack_tcp_loose is 0: the kernel picks up no connection in the middle. natkeep's "
        "entries are created beforehand, and its rules carry on kept connections whose entries "
        "are gone; but until a repair makes these again, ICMP errors do not get through.",
        "Nothing, or --mode stateless, which does not need the entries.",
    ),
    "no-criu": Explanation(
        Severity.STOP,
        "There is no program `criu` in PATH, and NATKEEP_CRIU names none.",
        "Install CRIU (criu.org, or a package), or name it: NATKEEP_CRIU=/path/of/criu.",
    ),
    "criu-fails": Explanation(
        Severity.STOP,
        "The CRIU in PATH (or NATKEEP_CRIU) did not dump and restore a process with a TCP "
        "connection that was made to try it. CRIU before 4.1 fails so on new kernels.",
        "Use a newer CRIU, as root, with all capabilities that `criu dump` needs.",
    ),
    "pid-in-use": Explanation(
        Severity.STOP,
        "CRIU gives each process and thread the id that it had, and one of them is taken here. The "
        "restore would fail.",
        "End that process, or restore in a pid namespace of its own (`unshare --pid --fork "
        "--mount-proc`, or a container).",
    ),
    "file-missing": Explanation(
        Severity.STOP,
        "CRIU opens files by their names and does not bring them: programs, libraries, logs, data, "
        "working directories, /dev/shm. The restore would fail at the first that is not there.",
        "Copy them with their modes before the restore; what changes while the process runs, once "
        "it is dumped.",
    ),
    "file-differs": Explanation(
        Severity.STOP,
        "CRIU refuses a file that has another size or mode than at the dump.",
        "Copy it again after the dump, or install the same version of its package.",
    ),
    "files-not-seen": Explanation(
        Severity.NOTE,
        "The tree has mounts of its own, as in a container. Which files are there is the matter of "
        "its image and volumes, and cannot be seen from outside.",
        "See that the container's image and volumes are the same.",
    ),
    "socket-directory": Explanation(
        Severity.STOP,
        "A Unix socket is bound in a directory that is not here. The restore would fail.",
        "Make the directory, with its owner and mode.",
    ),
    "sysv-ipc": Explanation(
        Severity.STOP,
        "A process has System V shared memory and no IPC namespace of its own. CRIU refuses the "
        "dump; nothing is lost by that.",
        "Start the process under `unshare --ipc`, or configure it to use other shared memory.",
    ),
    "image-incomplete": Explanation(
        Severity.WARN,
        "The directory has no pstree.img: it is enough to prepare by, and not to restore from.",
        "Copy all of the image to the destination.",
    ),
    "address-missing": Explanation(
        Severity.STOP,
        "A socket is bound to an address of the source that is not here and that no --map moves. "
        "CRIU could not bind it, and the restore would fail.",
        "Move that address as well (--map), or give it to the destination (`ip addr add`).",
    ),
    "udp-taken": Explanation(
        Severity.STOP,
        "Another socket here has an address and UDP port that CRIU will bind: the restore fails.",
        "End that program, or restore in another network namespace.",
    ),
    "device-missing": Explanation(
        Severity.STOP,
        "A socket is bound to a device (SO_BINDTODEVICE) that is not here. The restore would fail.",
        "Give a device here that name.",
    ),
    "source-translates": Explanation(
        Severity.STOP,
        "The source redirects, publishes or masquerades a connection by its own rules: its peer "
        "knows it by another address or port than the process. Only the source knows both, and "
        "when the process has left, the peer's packets would find nothing.",
        "Let peers connect to the process' own address and port; such connections cannot be kept.",
    ),
    "no-route": Explanation(
        Severity.WARN,
        "The gateway has no route to NEW, or to a peer, as things stand. That of a container may "
        "come with it.",
        "See that it is there before the move is opened: `ip route get ADDRESS`.",
    ),
    "no-way-there": Explanation(
        Severity.STOP,
        "What a peer sends is not passed on to NEW: the gateway has no route to it, or a route "
        "that drops.",
        "Give the gateway a route to NEW; `ip route get NEW from PEER iif DEVICE` shows what it "
        "does.",
    ),
    "no-way-back": Explanation(
        Severity.STOP,
        "What NEW sends does not reach a peer: there is no route from here, or one that drops.",
        "`ip route get PEER from NEW` shows what the host does, at a gateway with `iif DEVICE`; a "
        "rule (`ip rule`) may lead to a table without a route.",
    ),
    "peer-on-link": Explanation(
        Severity.STOP,
        "A peer is a neighbour of NEW: what the process answers goes to it directly, from NEW, "
        "and no gateway makes OLD of that. The peer answers with a reset.",
        "Route that peer by the gateway, at the destination and at the peer; or give NEW another "
        "link; or take the peer's connections out of the move.",
    ),
    "needs-peer-site": Explanation(
        Severity.WARN,
        "A peer is a neighbour of NEW, and the move has no gateway: what the process answers goes "
        "to the peer directly, from NEW, and its own host has to make OLD of that.",
        "natkeep prepare --site peer at that host; or a gateway, and routes by it.",
    ),
    "udp-unlocked": Explanation(
        Severity.WARN,
        "CRIU locks TCP alone. Once it has killed the process, the host that was left answers "
        "datagrams with port unreachable, which connected peers see as ECONNREFUSED.",
        "Have natkeep-hook prepare the source (NATKEEP_SOURCE), or relay (NATKEEP_VIA as well), at "
        "post-dump, while the sockets are still there.",
    ),
    "peer-beside-old": Explanation(
        Severity.STOP,
        "A peer is a neighbour of OLD: what it sends goes on to the old host, past this gateway.",
        "Make the old host the gateway, while it lives: a second address there, ip_forward=1, "
        "send_redirects=0, the destination's route to the peer by it, and --site gateway there.",
    ),
    "other-uplink": Explanation(
        Severity.STOP,
        "The gateway routes by source: what OLD sends leaves by one uplink, and what NEW sends, "
        "which has become OLD by the time it leaves, by another. A provider drops sources that "
        "are not its own.",
        "Give NEW the rule that OLD has, for these peers (`ip rule add from NEW to PEER lookup "
        "TABLE`).",
    ),
    "other-device": Explanation(
        Severity.WARN,
        "At the destination what NEW sends leaves by another device than that which has NEW, and "
        "not to a gateway of the move. The network there may drop a source that is not its own.",
        "Route what NEW sends by its own device (`ip rule add from NEW lookup TABLE`), or make "
        "sure that it arrives.",
    ),
    "other-way": Explanation(
        Severity.WARN,
        "By a policy rule or a mark the gateway sends what peers say to NEW by another device "
        "than what it says to NEW itself. The rule may have been made with OLD in mind.",
        "See that NEW is reached that way: `ip route get NEW from PEER iif DEVICE`.",
    ),
    "smaller-mtu": Explanation(
        Severity.NOTE,
        "The gateway's link to NEW takes smaller packets than that to OLD. Peers learn it by ICMP, "
        "which natkeep translates; where a firewall drops it, large segments would not get "
        "through.",
        "Let ICMP `fragmentation-needed` (IPv6 `packet-too-big`) pass from the gateway to the "
        "peers.",
    ),
    "reverse-path": Explanation(
        Severity.STOP,
        "rp_filter is strict on a device that kept packets come in by, and the way back to their "
        "source is another device: the kernel drops them without a word.",
        "Set net.ipv4.conf.DEVICE.rp_filter to 2 (loose), or make the routes symmetric.",
    ),
    "old-routed-apart": Explanation(
        Severity.STOP,
        "A policy routing rule at the destination is about OLD and not about NEW: what the "
        "restored sockets send, with OLD as its source, goes another way than NEW's packets. "
        "Rules about NEW need nothing: `prepare` has them hold for OLD, and `teardown` takes "
        "that back.",
        "Delete that rule, or have one for NEW as well.",
    ),
    "hop-translates": Explanation(
        Severity.STOP,
        "A host between the destination and its gateway, which is no site of the move, masquerades "
        "or redirects what passes there, as container engines do for their networks. The first "
        "packet would leave with another address, and the peer answers with a reset.",
        "Have it accept what goes between NEW and the peers in front of that rule; or give the "
        "container an address of its own on the network (macvlan, a routed subnet).",
    ),
    "dropped": Explanation(
        Severity.STOP,
        "A rule of others drops kept packets as they look at this site: between gateway and "
        "destination they have NEW where they had OLD before, and a firewall that does not ask "
        "for their state may know OLD alone.",
        "Accept them in front of the rule: NEW at a gateway, OLD at the destination.",
    ),
    "rewritten": Explanation(
        Severity.STOP,
        "A rule of others writes another address or port into kept packets, without conntrack: "
        "nothing knows the connection by what it becomes.",
        "Leave the kept connections out of that rule.",
    ),
    "flowtable-past-rules": Explanation(
        Severity.STOP,
        "A flowtable takes packets past all rules, and in mode stateless it is the rules that "
        "translate.",
        "--mode stateful, or leave the kept connections out of the flowtable's rule.",
    ),
    "virtual-server": Explanation(
        Severity.STOP,
        "IPVS has a server with the address and port of kept connections: it takes their packets "
        "by its own table of connections, before or instead of natkeep's rules.",
        "Move such connections where IPVS is not: take the server out of its table first.",
    ),
    "refused": Explanation(
        Severity.STOP,
        "`prepare` would refuse this move, for the reason that is said.",
        "What the line below it says.",
    ),
    "new-unusable": Explanation(
        Severity.STOP,
        "NEW is at the destination, but tentative (its duplicate address detection has not ended) "
        "or a duplicate (another host has it): the kernel neither sends nor takes packets with it.",
        "Wait until `ip address` says neither `tentative` nor `dadfailed`, or give it `nodad`.",
    ),
    "new-held": Explanation(
        Severity.STOP,
        "Another host on the destination's link answers for NEW: peers' packets may go there.",
        "Take NEW from that host, or choose another.",
    ),
    "marked-apart": Explanation(
        Severity.STOP,
        "Rules of others mark what OLD sends otherwise than what NEW sends, and `ip rule` routes "
        "by marks: kept packets would leave by another device.",
        "Have the rule that sets the mark match both, OLD and NEW.",
    ),
}
