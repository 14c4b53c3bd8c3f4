import sys
sys.path.insert(0,'.')
from verifiers import answers as A
import mathrl
old=len(sys.argv)>1
for l in sys.stdin:
    if not l.strip(): continue
    w,g,a=l.rstrip("\n").split(" | ")
    v,s=mathrl.verdict(mathrl.boxed_response(a),g)
    if old or str(v)!=w: print('BAD' if str(v)!=w else 'ok ',w,g,'<=',a,s)
