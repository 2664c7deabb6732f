"""Join finished shots into one video with titles, captions and sound.

Pictures are rendered in pieces, which are kept and reused; the film is their packets, copied. Everything streams, so memory
does not grow with the number of shots. Does not know Ray or stages.
"""
