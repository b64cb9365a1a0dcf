"""Every way a pickle makes a call, to everything worth calling, inside every format that embeds pickles."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from tests.security._hostile import named, text
from torchload.formats.files import LEGACY_MAGIC_NUMBER

CALLABLES = """
os.system posix.system nt.system os.popen os.execv os.posix_spawn os.remove os.mkdir os.kill os.putenv os.fork
os._exit subprocess.Popen subprocess.run subprocess.call subprocess.check_output pty.spawn commands.getoutput
platform.popen builtins.eval builtins.exec builtins.compile builtins.__import__ builtins.getattr builtins.setattr
builtins.open builtins.map builtins.filter builtins.apply builtins.breakpoint builtins.input builtins.type
builtins.globals builtins.vars __builtin__.eval __builtin__.exec __builtin__.execfile __main__.anything
importlib.import_module importlib.reload importlib.util.module_from_spec imp.load_source runpy.run_path
runpy.run_module pkgutil.resolve_name zipimport.zipimporter site.execsitecustomize sys.exit sys.settrace sys.modules
code.interact code.InteractiveInterpreter codeop.compile_command bdb.Bdb pdb.run profile.run cProfile.run
timeit.timeit trace.Trace doctest.debug_script unittest.main ensurepip.bootstrap pip.main venv.create idlelib.run.main
marshal.loads pickle.loads pickle.Unpickler _pickle.loads shelve.open copyreg._reconstructor copyreg.add_extension
types.FunctionType types.CodeType types.MethodType functools.partial functools.reduce operator.methodcaller
operator.attrgetter operator.itemgetter itertools.starmap weakref.finalize atexit.register threading.Thread
_thread.start_new_thread signal.signal multiprocessing.Process concurrent.futures.ProcessPoolExecutor asyncio.run
ctypes.CDLL ctypes.memmove ctypes.pythonapi cffi.FFI gc.get_objects faulthandler._sigsegv shutil.rmtree shutil.move
shutil.copyfile tempfile.mktemp pathlib.Path.unlink pathlib.Path.write_text logging.FileHandler
socket.create_connection urllib.request.urlopen http.client.HTTPConnection ftplib.FTP smtplib.SMTP telnetlib.Telnet
webbrowser.open antigravity.geohash xmlrpc.client.ServerProxy requests.get ssl.get_server_certificate torch.load
torch.hub.load torch.hub.load_state_dict_from_url torch.jit.load torch.ops.load_library torch.compile
torch.classes.load_library torch.utils.cpp_extension.load torch.utils.cpp_extension.load_inline
torch.storage._load_from_bytes torch.jit.unsupported_tensor_ops.execWrapper torch.fx.graph_module._forward_from_src
torch.package.PackageImporter torch.distributed.rpc.rpc_sync torch._dynamo.guards.GuardBuilder.get
torch.utils.data.DataLoader torch.multiprocessing.spawn torch.serialization.add_safe_globals
torch.utils._config_module.load_config torch._inductor.codecache.compile_file numpy.load numpy.fromfile numpy.memmap
numpy.testing._private.utils.runstring numpy.f2py.compile joblib.load dill.loads cloudpickle.loads pandas.read_pickle
yaml.unsafe_load sklearn.utils.deprecation.deprecated
""".split()  # fmt: skip


def _parts(qualified: str) -> tuple[str, str]:
    module, _, name = qualified.rpartition(".")
    return module, name


def calls(qualified: str, argument: str) -> Iterator[bytes]:
    """Pickles that call a function with one argument: by each opcode that makes a call."""
    module, name = _parts(qualified)
    function, value = named(module, name), text(argument)
    yield b"\x80\x02" + function + value + b"\x85R."  # REDUCE
    yield b"\x80\x04" + text(module) + text(name) + b"\x93" + value + b"\x85R."  # STACK_GLOBAL
    yield b"(" + value + f"i{module}\n{name}\n.".encode()  # INST
    yield b"(" + function + value + b"o."  # OBJ
    yield b"\x80\x02" + function + value + b"\x85\x81."  # NEWOBJ
    yield b"\x80\x04" + function + value + b"\x85}\x92."  # NEWOBJ_EX
    yield b"\x80\x02" + function + b")R}" + text("__setstate__") + function + b"sb" + value + b"b."  # BUILD
    yield b"\x80\x02" + named("functools", "partial") + function + value + b"\x86R)R."  # what a call returns
    yield b"\x80\x02" + named("torch._utils", "_rebuild_parameter") + function + value + b"\x85R\x88N\x87R."
    yield b"\x80\x02}" + text("state_dict") + function + value + b"\x85Rs."  # beside weights


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def _legacy(payload: bytes) -> bytes:
    head = [LEGACY_MAGIC_NUMBER, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}]
    return b"".join(pickle.dumps(value, 2) for value in head) + payload + pickle.dumps([], 2)


def _tar(payload: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("sys_info", payload), ("pickle", payload), ("storages", payload), ("tensors", payload)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _npy(payload: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(0, "f4"))
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload


def _nested(payload: bytes) -> bytes:
    return _zip({"policy.pth": _zip({"archive/data.pkl": payload, "archive/version": b"3\n"}), "data": b"{}"})


def _distributed(payload: bytes) -> dict[str, bytes]:
    return {".metadata": payload, "__0_0.distcp": b""}


def _deepspeed(payload: bytes) -> dict[str, bytes]:
    inner = _zip({"archive/data.pkl": payload, "archive/version": b"3\n"})
    return {"latest": b"step1", "step1/mp_rank_00_model_states.pt": inner}


CONTAINERS: dict[str, Callable[[bytes], bytes | dict[str, bytes]]] = {
    "zip": lambda payload: _zip({"archive/data.pkl": payload, "archive/version": b"3\n"}),
    "TorchScript data": lambda payload: _zip(
        {"m/data.pkl": payload, "m/constants.pkl": b"\x80\x02).", "m/code/__torch__.py": b"", "m/version": b"3\n"}
    ),
    "TorchScript constants": lambda payload: _zip(
        {"m/data.pkl": b"\x80\x02).", "m/constants.pkl": payload, "m/code/__torch__.py": b"", "m/version": b"3\n"}
    ),
    "legacy": _legacy,
    "plain pickle": lambda payload: payload,
    "tar": _tar,
    "npy": _npy,
    "npz": lambda payload: _zip({"weight.npy": _npy(payload)}),
    "nested zip": _nested,
    "distributed": _distributed,
    "DeepSpeed": _deepspeed,
}
