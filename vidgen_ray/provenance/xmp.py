"""XMP packets: write one from properties, and find properties in one that any tool has written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.sax.saxutils import escape

NAMESPACES = {
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "vidgen": "urn:vidgen-ray:provenance:1",
}
NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"


def xmp_packet(properties: Mapping[str, str]) -> str:
    """Return a packet with these text properties, `prefix:Name` -> value. The same properties give the same packet."""
    lines = [f"   <{name}>{escape(_allowed_in_xml(value))}</{name}>" for name, value in properties.items()]
    prefixes = "".join(f' xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items())
    return "\n".join(
        [
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>',
            '<x:xmpmeta xmlns:x="adobe:ns:meta/">',
            f' <rdf:RDF xmlns:rdf="{RDF}">',
            f'  <rdf:Description rdf:about=""{prefixes}>',
            *lines,
            "  </rdf:Description>",
            " </rdf:RDF>",
            "</x:xmpmeta>",
            '<?xpacket end="r"?>',
        ]
    )


def xmp_property(packet: str, name: str) -> str | None:
    """Return the text of a property, `prefix:Name`, or `None` if the packet has none or is not valid XML.

    Reads both forms of simple properties: elements and attributes.
    """
    prefix, _, local = name.partition(":")
    qualified = f"{{{NAMESPACES[prefix]}}}{local}"
    # Packets have no document type; one could define entities that expand to gigabytes.
    if "<!DOCTYPE" in packet:
        return None
    try:
        root = ElementTree.fromstring(packet.strip("\ufeff\0 \n"))
    except ElementTree.ParseError:
        return None
    for description in root.iter(f"{{{RDF}}}Description"):
        if (attribute := description.get(qualified)) is not None:
            return attribute
        if (element := description.find(qualified)) is not None:
            return element.get(f"{{{RDF}}}resource") or element.text
    return None


def _allowed_in_xml(text: str) -> str:
    """Return the text without control characters and surrogates, which XML does not allow."""
    return NOT_IN_XML.sub("", text)
