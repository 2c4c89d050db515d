"""A real S3 server for tests: OpenStack Swift with its s3api, in a virtual environment of its own, on loopback.

    python tests/swift_server.py FOLDER        # starts one and prints the AWS_ variables to reach it; Ctrl-C ends it
"""
import ctypes
import getpass
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv

SWIFT = 'swift==2.38.3'  # 79 MB with what it needs
PROXY = '''
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
user = {user}
workers = 0
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats bulk s3api tempauth copy slo dlo proxy-logging proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
# a slow machine is not a broken one: by default a server that takes 0.5 s to answer is left out for a minute
conn_timeout = 60
node_timeout = 60
error_suppression_limit = 1000000
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_fela_writer = a-good-secret .admin
user_fela_reader = a-weak-secret
''' + ''.join(f'[filter:{name}]\nuse = egg:swift#{egg}\n' for name, egg in (
    ('catch_errors', 'catch_errors'), ('gatekeeper', 'gatekeeper'), ('listing_formats', 'listing_formats'), ('bulk', 'bulk'),
    ('copy', 'copy'), ('slo', 'slo'), ('dlo', 'dlo'), ('proxy-logging', 'proxy_logging')))
STORAGE = '''
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
user = {user}
workers = 0
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
conn_timeout = 60
node_timeout = 60
container_update_timeout = 60
'''


class CannotInstall(Exception):
    """Why there is no server here, in one line."""


def install(cache=None):
    """The bin folder of an environment with Swift, made once per cache folder."""
    cache = cache or os.path.join(tempfile.gettempdir(), f'fela-swift-{os.getuid()}')
    done = os.path.join(cache, 'done')
    if not os.path.exists(done):
        try:
            venv.create(cache, with_pip=True, clear=True)
            pip = subprocess.run([os.path.join(cache, 'bin', 'pip'), 'install', '--quiet', SWIFT, 'setuptools<81'], capture_output=True,
                                 text=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as e:
            raise CannotInstall(f'no virtual environment for Swift: {e}') from None
        if pip.returncode:
            raise CannotInstall(f'pip install {SWIFT}: {(pip.stderr.strip().splitlines() or ["failed"])[-1]}')
        open(done, 'w').close()
    return os.path.join(cache, 'bin')


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: tests that are killed leave nothing running


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Swift:
    """Four processes: account, container, object, proxy. `env` holds the AWS_ variables of a user who may write."""

    def __init__(self, folder, cache=None):
        self.folder, self.bin, self.processes = os.path.abspath(str(folder)), install(cache), {}
        os.makedirs(os.path.join(self.folder, 'devices', 'd1'), exist_ok=True)
        try:
            os.setxattr(os.path.join(self.folder, 'devices'), 'user.test', b'')
        except OSError as e:
            raise CannotInstall(f'{self.folder} takes no user xattrs: {e.strerror}') from None
        self.ports = dict(zip(('account', 'container', 'object', 'proxy'), free_ports(4)))
        for kind, port in self.ports.items():
            text = PROXY if kind == 'proxy' else STORAGE
            self.write(f'{kind}.conf', text.format(folder=self.folder, user=getpass.getuser(), kind=kind, port=port))
            if kind != 'proxy':
                for args in (['create', '2', '1', '0'], ['add', f'r1z1-127.0.0.1:{port}/d1', '1'], ['rebalance']):
                    subprocess.run([f'{self.bin}/swift-ring-builder', f'{self.folder}/{kind}.builder', *args], check=True, capture_output=True)
        self.write('swift.conf', '[swift-hash]\nswift_hash_path_suffix = fela\n')
        self.endpoint = f'http://127.0.0.1:{self.ports["proxy"]}'
        self.env = {'AWS_ENDPOINT_URL': self.endpoint, 'AWS_ACCESS_KEY_ID': 'fela:writer', 'AWS_SECRET_ACCESS_KEY': 'a-good-secret',
                    'AWS_DEFAULT_REGION': 'us-east-1', 'AWS_EC2_METADATA_DISABLED': 'true'}
        self.reader = self.env | {'AWS_ACCESS_KEY_ID': 'fela:reader', 'AWS_SECRET_ACCESS_KEY': 'a-weak-secret'}
        self.start()

    def write(self, name, text):
        with open(os.path.join(self.folder, name), 'w') as file:
            file.write(text)

    def start(self, kinds=('account', 'container', 'object', 'proxy')):
        for kind in kinds:
            with open(os.path.join(self.folder, f'{kind}.log'), 'a') as log:
                self.processes[kind] = subprocess.Popen([f'{self.bin}/python', f'{self.bin}/swift-{kind}-server', f'{self.folder}/{kind}.conf', 'verbose'],
                                                        stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent)
        end = time.monotonic() + 120
        for kind in kinds:
            while True:
                try:
                    socket.create_connection(('127.0.0.1', self.ports[kind]), 1).close()
                    break
                except OSError:
                    if time.monotonic() > end or self.processes[kind].poll() is not None:
                        raise CannotInstall(f'Swift does not start: see {self.folder}/{kind}.log') from None
                    time.sleep(0.05)

    def create_bucket(self, name):
        """Tried until all four processes answer, for two minutes at most."""
        from botocore.exceptions import BotoCoreError, ClientError
        end = time.monotonic() + 120
        while True:
            try:
                return self.client().create_bucket(Bucket=name)
            except (BotoCoreError, ClientError) as e:
                if getattr(e, 'response', {}).get('Error', {}).get('Code') == 'BucketAlreadyOwnedByYou':  # by a try that seemed to fail
                    return
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    def stop(self, kinds=('proxy', 'object', 'container', 'account')):
        for kind in kinds:
            if process := self.processes.pop(kind, None):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def client(self):
        import boto3
        from botocore.config import Config
        return boto3.client('s3', endpoint_url=self.endpoint, aws_access_key_id=self.env['AWS_ACCESS_KEY_ID'], region_name='us-east-1',
                            aws_secret_access_key=self.env['AWS_SECRET_ACCESS_KEY'], config=Config(s3={'addressing_style': 'path'}))


if __name__ == '__main__':
    server = Swift(sys.argv[1])
    print(''.join(f'export {key}={value}\n' for key, value in server.env.items()), flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        server.stop()
