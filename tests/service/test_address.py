"""HOST:PORT as people write it."""

import pytest

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.service.address import address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("9464", "127.0.0.1", 9464),
        (":9464", "127.0.0.1", 9464),
        ("0.0.0.0:0", "0.0.0.0", 0),
        ("[::1]:80", "::1", 80),
        ("box.example:80", "box.example", 80),
    ],
)
def test_without_a_host_it_is_this_machine_alone(text, host, port):
    assert address(text, "--metrics") == (host, port)


@pytest.mark.parametrize("text", ["", "host", "host:", "1:65536", "1:-1", "a b:80", "1:٣", "[::1]"])
def test_what_is_no_address_is_refused_in_one_line(text):
    with pytest.raises(BadInputError, match=r"^--metrics .*is no address: give PORT or HOST:PORT"):
        address(text, "--metrics")
