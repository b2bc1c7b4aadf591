"""The looks at a process, or its image: would CRIU dump it here, and restore it there?"""

from __future__ import annotations

from collections.abc import Iterator

from natkeep.checkpoint import ELSEWHERE, Checkpoint
from natkeep.checkpoint.archive import opened_image
from natkeep.checkpoint.live import find_tree
from natkeep.checkpoint.tree import read_tree
from natkeep.errors import ImageError, KernelError
from natkeep.kernel import criu_trial, rtnetlink
from natkeep.kernel import process as processes
from natkeep.lifecycle.sockets import find_taken, find_translated, find_unbindable
from natkeep.lifecycle.subject import Look, Subject
from natkeep.plan.findings import Finding, ok
from natkeep.plan.move import Site
from natkeep.plan.process import Tree, judge, judge_dump
from natkeep.plan.roles import Role


def look_at_criu(subject: Subject) -> Iterator[Finding]:
    """Which CRIU is here, and whether it works; tried, which takes a second."""
    if not (subject.image or subject.pid) or not _sites(subject, Role.DESTINATION, Role.SOURCE):
        return
    criu = criu_trial.find_criu()
    if criu is None:
        yield Finding("no-criu", None, "no criu in PATH")
        return
    name = f"criu {criu_trial.read_version(criu) or 'of no version'} ({criu})"
    works, said = criu_trial.try_out(criu)
    if not works:
        yield Finding("criu-fails", None, f"{name}: {said}")
    else:
        yield ok(None, f"{name} dumps and restores TCP here{said and f', with {said}'}")


def look_at_tree(subject: Subject) -> Iterator[Finding]:
    """Ids, files and directories that the tree needs, and whether they are at the destination."""
    destinations = _sites(subject, Role.DESTINATION)
    tree = None if subject.checkpoint is None else subject.checkpoint.tree
    if subject.pid is not None:
        tree = read_living_tree(subject.pid)
    elif tree is None and subject.image and destinations:
        with opened_image(subject.image) as images:
            tree = read_tree(images)
        if tree is None:
            yield Finding("image-incomplete", None, f"no pstree.img in {subject.image}")
    if tree is None:
        return
    if tree.home:
        yield from judge_dump(tree)
    for site in destinations:
        try:
            shown = processes.look_at(site.netns, tree)
        except OSError as error:
            raise KernelError(f"{site}: cannot look at its processes: {error.strerror}") from None
        yield from judge(site, tree, shown)


def read_living_tree(pid: int) -> Tree:
    """What the tree below *pid* needs; ImageError where it cannot be read."""
    try:
        return processes.read_living(find_tree(pid), pid)
    except OSError as error:  # it has ended meanwhile
        raise ImageError(f"cannot look at process {pid}: {error.strerror}") from None


def look_at_sockets(subject: Subject) -> Iterator[Finding]:
    """Whether each socket can have its address there, and is on the wire what the image says."""
    if subject.checkpoint is None:
        return
    yield from _look_at_destination(subject, subject.checkpoint)
    yield from _look_at_source(subject, subject.checkpoint)


def _look_at_destination(subject: Subject, checkpoint: Checkpoint) -> Iterator[Finding]:
    if subject.plan is None or not checkpoint.sockets:
        return
    unmapped = checkpoint.unmapped([map_.old for map_ in subject.plan.move.maps])
    bound = {each.bound_device for each in checkpoint.sockets if each.unkept != ELSEWHERE} - {None}
    for site in _sites(subject, Role.DESTINATION):
        found = [*find_unbindable(subject.kernel, site, unmapped)]
        for each in found:
            yield Finding("address-missing", site, f"{each}, which no --map moves")
        taken = [*find_taken(subject.kernel, site, checkpoint)]
        yield from (Finding("udp-taken", site, f"udp {end}") for end in taken)
        if not (found or taken):
            yield ok(site, "every socket's address is there, or is moved")
        missing = bound - subject.kernel.ask(site, rtnetlink.device_names) if bound else ()
        for device in sorted(filter(None, missing)):
            yield Finding("device-missing", site, f"{device}, which a socket is bound to")


def _look_at_source(subject: Subject, checkpoint: Checkpoint) -> Iterator[Finding]:
    """At the OLDs of the move, or of a process alone at whatever addresses it has."""
    marked = [each for each in checkpoint.sockets if each.is_translated()]
    for each in marked:
        yield Finding("source-translates", None, f"{each}: {each.unkept}")
    if subject.plan is not None:
        kept = subject.plan.move.share(checkpoint.connections)
    else:
        here = (each.local for each in checkpoint.sockets if each.is_connection())
        olds = {end.address for end in here if end is not None}
        kept = [checkpoint.connections.at(old) for old in olds]
    for site in _sites(subject, Role.SOURCE) if subject.state is not None else ():
        assert subject.state is not None
        around = subject.kernel, subject.state, site
        found = [*find_translated(*around, kept)]
        for inner, outer in found[:1]:
            what = f"{inner} is {outer} on the wire; {len(found)} in all"
            yield Finding("source-translates", site, what)
        if not (found or marked):
            yield ok(site, "it translates none of the connections itself")


def _sites(subject: Subject, *roles: Role) -> list[Site]:
    return [site for site in subject.sites if site.role in roles]


OF_PROCESS: tuple[Look, ...] = (look_at_sockets, look_at_tree, look_at_criu)
"""Asked by `check` alone; by what costs nothing of it `prepare` and `run` refuse, in check.py."""
