"""Programs that know nothing of the lab, as they are installed: a server of theirs moves.

    programs = Programs(lab)                           UDP: UdpPrograms(lab)
    programs.serve_by("dnsmasq", …)                    at the source, by its command line
    programs.keep_tuples(FourTuple(peer, OLD:53))      which are to be kept, as the peer sees them
    lab.move(); …; programs.newcomer(tuple); lab.finish()

Rule: whether they are answered is for the scenario or the test to say; the captures are judged as
those of the lab's own applications, but that nothing is numbered.
"""

from __future__ import annotations

from natkeep.lab.application import Application
from natkeep.lab.engine import Moving
from natkeep.lab.lab import Lab
from natkeep.lab.listeners import NewConnection
from natkeep.lab.traffic_words import Traffic
from natkeep.lab.udp import Datagrams
from natkeep.plan.tuples import FourTuple


class Programs(Traffic):
    """The traffic of *lab*: a program at the source, and what peers say to it."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab.name, lab.directory, lab.report)
        lab.settle()
        lab.traffic, self.lab = self, lab

    def serve_by(self, *argv: str) -> None:
        """The program *argv* is started at the source."""
        lab = self.lab
        lab.at = lab.topology[lab.home.role]
        program = lab.at.start("program", *argv)
        application = Application(lab.directory / "program")
        self.server = Moving(application, "serve", program.pid, udp=lab.udp)

    def keep_tuples(self, *tuples: FourTuple) -> None:
        """These peers have been answered."""
        self.kept = tuples
        self.views = {each: each for each in tuples}
        self.report.before = [str(each) for each in tuples]

    def newcomer(self, tuple_: FourTuple) -> None:
        """This peer has been answered after the move."""
        nothing = Application(self.directory / "newcomer")
        self.lab.new_connections.made.append(NewConnection(nothing, tuple_, accepted=True))

    def mark(self) -> None:
        """The peers measure for themselves."""

    def check_ends(self) -> None:
        """What the peers see was said before this."""
        self.report.after = [str(each) for each in self.kept]


class UdpPrograms(Programs, Datagrams):
    """As Programs, of UDP."""

    numbered = False
