"""Scores: MusicXML becomes ABC notation (text to learn) and a picture (what is seen), both from the one file.

score.py   MusicXML -> voices of bars of events, each event already in ABC; an element ABC has no words for is refused
notes.py   notes, chords and grace notes with all that stands at them
marks.py   keys, clefs, meters, barlines, directions, chord symbols
abc.py     bars -> tunes in ABC, of the whole score or of the systems of one page
address.py how a page is named
draw.py    MusicXML -> pages (page.py): their pictures, systems and the box of the ink
engrave.py what draws them (verovio, resvg), in a process of its own (worker.py)
"""
