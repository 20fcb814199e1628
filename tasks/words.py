"""Word lists. Training and held-out splits use different words: see `some` and `invent`."""
from .base import held, pick

THINGS = """\
apple arrow badge ball barrel basket bell bench bicycle boat book bottle bowl box bridge
brush bucket button cable camera candle canoe carpet chair clock coat coin comb compass
cup curtain desk door drum fan fence flag flute fork glass globe glove guitar hammer hat
helmet hook kettle key kite knife ladder lamp lantern leaf lens letter lock map mask
mirror nail needle oven paddle pan paper pen piano pillow pipe plate plow pump radio
ring rope ruler saddle sail scarf shelf shell shoe sock spoon stamp stool stove table
tent ticket tool torch towel tower train tray truck vase violin wagon watch wheel
whistle window wire""".split()
NAMES = """\
Ada Alan Amir Anna Bela Boris Carl Cleo Dora Edda Elif Emil Enzo Fay Finn Gina Hana Hugo
Ida Igor Ines Ivo Jana Jonas Kai Karin Lara Leo Lina Luis Maja Marc Mia Milo Nadia Nils
Nora Olga Omar Otto Paula Pia Quin Rafa Rosa Sami Sara Selma Timo Tove Uma Vera Viktor
Wanda Xenia Yara Yusuf Zoe""".split()
CONTROLS = """\
Alarm Alerts Arrows Autofill Autoplay Backup Badges Banners Battery Beep Blur Bold
Borders Bounce Brakes Breaks Bubbles Cache Camera Captions Carousel Chime Clips Cloud
Colors Contrast Cookies Corners Cursor Decimals Dimmer Dock Drafts Echo Effects Emoji
Fade Filter Flash Flicker Focus Folders Footer Frames Gestures Glow Grain Gravity Grid
Guest Guides Haptics Header Hints History Hotspot Icons Images Inbox Invert Jingle Jumps
Keys Layers Ledger Limits Links Locks Loop Loudness Margins Markers Memory Mentions
Merge Metrics Mirror Mono Motion Mute Network Night Numbers Outline Overlay Pacing
Pairing Parking Pause Photos Pings Pointer Portal Preview Privacy Profile Pulse Quotes
Radar Recents Replay Reports Retry Ripple Roaming Rotation Rounding Safety Search
Seconds Shadow Sharing Sketch Sleep Snap Sounds Speech Spelling Spotlight Sync Tags
Tethers Themes Tilt Timer Toasts Tooltips Touch Traces Trails Travel Updates Vibrate
Voices Volume Wallet Warmth Widgets Wobble Wrap Zoom""".split()
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
ONSETS, VOWELS = "b br d dr f g gl h k kr l m n p pl r s st t tr v w z".split(), "a e i o u".split()
CODAS = ["", "", "l", "m", "n", "r", "s", "x"]


def some_of(rng, things, n: int | None = None) -> list:
    """n of these things, or all of them, in random order."""
    return [things[i] for i in rng.permutation(len(things))[:n].tolist()]


def some(rng, words, n: int, heldout: bool) -> list[str]:
    """n different words in random order, of those that belong to the split."""
    return some_of(rng, [word for word in words if held(word) == heldout], n)


def invent(rng, heldout: bool, syllables: int = 2) -> str:
    """A pronounceable name without a meaning, one that belongs to the split."""
    while True:
        name = "".join(pick(rng, ONSETS) + pick(rng, VOWELS) for _ in range(syllables))
        name = (name + pick(rng, CODAS)).capitalize()
        if held(name) == heldout:
            return name
