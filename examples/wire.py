"""Wire a tap to vhost-net, move frames, stop, and go on where the rings stood."""

from vhostctl import GuestMemory, NetDriver, Session, Tap, VhostNet

with (
    GuestMemory.anonymous(8 << 20) as memory,
    Tap.open("tap0") as tap,
    VhostNet.open() as device,
    Session(memory=memory, tap=tap, vhost=[device]) as session,
    NetDriver(session, session.pairs, session.features, session.arena) as driver,
):
    session.start()
    pair = driver.pairs[0]
    pair.start()
    pair.send([bytes.fromhex("ffffffffffff020000000002 88b5") + bytes(46)])
    frames = pair.receive() if pair.wait(0.1) else []

    bases = session.stop()  # VHOST_GET_VRING_BASE of each ring
    session.start(bases)
    pair.start()
    print(bases, len(frames), pair.stats())
