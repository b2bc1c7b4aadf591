"""What else a cluster has at its nodes: a service's address, a policy, and a peer that is a pod.

    service = Service(lab)              kube-proxy's part, at the client's node: the lab's gateway
    service.lead_to(lab.old)            … its endpoint; later lab.new
    lab.traffic.dial_one_by_one(lab.topology["client"], service.end, 3)

    add_policy(lab)                     the destination's node lets nothing pass but NEW's
    beside = PeerBeside(lab)            the client is a pod of the destination's node, and a site

Rule: each is there before the move, and natkeep is told nothing of it.
"""

from __future__ import annotations

import time

from natkeep.lab.application import start_client, tuple_of
from natkeep.lab.lab import Lab
from natkeep.lab.listeners import NewConnection
from natkeep.lab.peer_host import SERVICE, SERVICE_PORT, PeerHost
from natkeep.lab.pods.move import NETS
from natkeep.lab.topology import Address
from natkeep.lab.traffic_words import PORT
from natkeep.plan.tuples import Endpoint, FourTuple


class Service:
    """One address and port, which the client's node turns into those of the endpoint."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.end = Endpoint(SERVICE[lab.family], SERVICE_PORT)
        ip = "ip" if lab.family == 4 else "ip6"
        lab.topology["gateway"].nft(
            "add table inet service\n"
            f"add map inet service ends {{ type ipv{lab.family}_addr : ipv{lab.family}_addr; }}\n"
            "add chain inet service pre { type nat hook prerouting priority dstnat; }\n"
            f"add rule inet service pre {ip} daddr {self.end.address} tcp dport {self.end.port}"
            f" dnat {ip} to {ip} daddr map @ends:{PORT}\n"
        )

    def lead_to(self, endpoint: Address) -> None:
        """New connections go there, from here on."""
        self.lab.topology["gateway"].nft(
            "flush map inet service ends\n"
            f"add element inet service ends {{ {self.end.address} : {endpoint} }}\n"
        )

    def must_answer(self) -> None:
        """A new caller is let in, by the pod that the service leads to now."""
        lab = self.lab
        with lab.report.should("a new caller of the service is answered"):
            caller = start_client(lab.topology["client"], "caller", self.end)
            [mine] = caller.fresh()["connections"]
            # As it is between gateway and node, which is where it is judged.
            seen = FourTuple(tuple_of(mine).source, Endpoint(lab.old, PORT))
            lab.new_connections.made.append(NewConnection(caller, seen, accepted=True))
            caller.do({"push": 4096})
            caller.wait(lambda report: report["connections"][0]["rx"] >= 4096, "an answer in full")


def add_policy(lab: Lab) -> None:
    """As a network policy: of all pods of the destination's node NEW alone hears and is heard."""
    ip, new = "ip" if lab.family == 4 else "ip6", lab.site.address(lab.family)
    table = "inet cluster_policy"
    lab.topology["destination"].nft(
        f"add table {table}\n"
        f"add chain {table} forward {{ type filter hook forward priority filter; }}\n"
        f'add rule {table} forward oifname "cni0" {ip} daddr != {new} drop\n'
        f'add rule {table} forward iifname "cni0" {ip} saddr != {new} drop\n'
    )


class PeerBeside(PeerHost):
    """The client is on the bridge of the destination's node, as another pod; it is a peer site.

    Between the two nothing is routed, so that no node translates for it.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        net, client, node = NETS["far"], lab.topology["client"], lab.topology["destination"]
        switch = lab.topology["switch"]
        switch.run("ip", "link", "set", "client", "netns", node.name)
        bridge = [  # as the plugin makes it for the first pod, and takes it if it is there
            "link add cni0 type bridge", f"address add 10.{net}.0.1/24 dev cni0",
            f"address add fd00:{net}::1/64 dev cni0 nodad", "link set cni0 up",
            "link set client master cni0 up",
        ]  # fmt: skip
        node.run("ip", "-batch", "-", text_in="\n".join(bridge))
        lines = [
            "address flush dev eth0 scope global",
            f"address add 10.{net}.0.200/24 dev eth0",
            f"address add fd00:{net}::200/64 dev eth0 nodad",
            f"route replace default via 10.{net}.0.1",
            f"route replace default via fd00:{net}::1",
        ]  # fmt: skip
        client.run("ip", "-force", "-batch", "-", text_in="\n".join(lines))

    def restore(self) -> None:
        """Until here it said OLD beyond the gateway, where OLD was."""
        self.lab.clean_from_ns = time.time_ns()
        self.lab.restore()
