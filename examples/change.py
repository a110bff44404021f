"""Change a session while its rings run, and hand it over as a document."""

from vhostctl import MappedRegion, Session, SessionConfig

with (
    MappedRegion.memfd(1 << 40, 1 << 30, "dimm0") as dimm,
    Session(SessionConfig(queues=2)) as session,
):
    session.start()
    session.memory.add(dimm)  # on every device at once
    session.disable_pair(1)  # what a guest's MQ command asks for; no frame is lost over it
    session.set_link(False)
    session.set_link(True)
    session.start_log()  # which pages the devices write from now on
    document = session.suspend().to_json()  # Session.resume() goes on from it, elsewhere
    print(document)
