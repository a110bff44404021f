"""The ACPI tables: found from the RSDP on, whole, and as iasl reads them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from vhostctl.errors import InvalidArgument
from vhostctl.vmm import acpi, aml, layout


class Image:
    """The tables as a guest finds them, by guest physical address."""

    def __init__(self, cpus: int) -> None:
        self.bytes = acpi.tables(cpus)
        self.rsdp = self.bytes[:36]
        (xsdt,) = struct.unpack_from("<Q", self.rsdp, 24)
        listed = self.table(xsdt)
        self.tables = {
            table[:4].decode(): table
            for table in map(
                self.table, struct.unpack_from(f"<{(len(listed) - 36) // 8}Q", listed, 36)
            )
        }
        fadt = self.tables["FACP"]
        (dsdt,) = struct.unpack_from("<I", fadt, 40)
        assert struct.unpack_from("<Q", fadt, 140) == (dsdt,)
        self.tables["DSDT"] = self.table(dsdt)
        (self.facs,) = struct.unpack_from("<I", fadt, 36)

    def table(self, gpa: int) -> bytes:
        at = gpa - layout.ACPI_TABLES
        (length,) = struct.unpack_from("<I", self.bytes, at + 4)
        table = self.bytes[at : at + length]
        assert len(table) == length >= 36
        return table


@pytest.mark.parametrize("cpus", [1, 2, 64, layout.MAX_CPUS])
def test_every_table_is_found_and_adds_up(cpus: int) -> None:
    image = Image(cpus)
    assert image.rsdp.startswith(b"RSD PTR ")
    assert sum(image.rsdp[:20]) % 256 == 0
    assert sum(image.rsdp) % 256 == 0
    assert set(image.tables) == {"FACP", "APIC", "DSDT"}
    assert all(sum(table) % 256 == 0 for table in image.tables.values())
    assert image.facs % 64 == 0
    assert image.table(image.facs)[:8] == struct.pack("<4sI", b"FACS", 64)
    assert layout.ACPI_TABLES + len(image.bytes) <= layout.KERNEL_MIN


def test_the_madt_has_a_lapic_for_each_vcpu() -> None:
    madt = Image(3).tables["APIC"]
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    lapics = [struct.unpack_from("<BBI", entry, 2) for entry in entries if entry[0] == 0]
    assert lapics == [(0, 0, 1), (1, 1, 1), (2, 2, 1)]
    assert [struct.unpack_from("<II", e, 4) for e in entries if e[0] == 1] == [(0xFEC00000, 0)]
    overrides = [struct.unpack_from("<BIH", entry, 3) for entry in entries if entry[0] == 2]
    assert overrides == [(0, 2, 0), (9, 9, 0x0D)]


def test_the_fadt_says_how_to_power_off_and_reset() -> None:
    fadt = Image(1).tables["FACP"]
    assert len(fadt) == 276
    assert struct.unpack_from("<H", fadt, 46) == (9,)
    assert struct.unpack_from("<II", fadt, 48) == (0, 0)  # no SMI: always in ACPI mode
    assert struct.unpack_from("<I", fadt, 56) == (0x600,)
    assert struct.unpack_from("<I", fadt, 64) == (0x604,)
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 10
    assert not flags & 1 << 20  # not hardware-reduced
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0x64, 0xFE)


@pytest.mark.parametrize("cpus", [0, -1, layout.MAX_CPUS + 1])
def test_there_cannot_be_so_many_vcpus(cpus: int) -> None:
    with pytest.raises(InvalidArgument, match="use 1 to 254"):
        acpi.tables(cpus)


def test_lengths_and_integers_take_as_many_bytes_as_they_need() -> None:
    for size in (0, 61, 62, 63, 300, 4092, 4093, 5000):
        encoded = aml.scope("\\_SB_", bytes(size))
        extra = encoded[1] >> 6
        total = encoded[1] & (0xF if extra else 0x3F)
        total |= int.from_bytes(encoded[2 : 2 + extra], "little") << 4
        assert total == len(encoded) - 1
    assert aml.integer(0) == b"\x00"
    assert aml.integer(1) == b"\x01"
    assert aml.integer(2) == b"\x0a\x02"
    assert aml.integer(0x100) == b"\x0b\x00\x01"
    assert aml.integer(0x1FFFF) == b"\x0c\xff\xff\x01\x00"
    assert aml.eisa_id("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"


def test_iasl_reads_what_was_meant(tmp_path: Path) -> None:
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("no iasl")
    texts = {}
    for name, table in Image(2).tables.items():
        (tmp_path / f"{name}.dat").write_bytes(table)
        run = subprocess.run(
            [iasl, "-d", f"{name}.dat"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        assert "Error" not in run.stdout + run.stderr
        texts[name] = (tmp_path / f"{name}.dsl").read_text()
    dsdt = texts["DSDT"]
    assert 'Name (_HID, EisaId ("PNP0A03")' in dsdt
    assert "0x3EC00000,         // Length" in dsdt
    assert "0x4000,             // Length" in dsdt
    assert dsdt.count("Package (0x04)") == 1 + layout.PCI_SLOTS
    again = subprocess.run(
        [iasl, "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert "0 Errors" in again.stdout
