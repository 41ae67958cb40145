"""How fast is it, and how much memory does it take, against other libraries on the same machine?"""
