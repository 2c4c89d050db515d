"""A small S3 on loopback for tests: objects in memory, requests counted, and faults on demand."""
import hashlib
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape


class FakeS3(ThreadingHTTPServer):
    """objects: {bucket/key: bytes}; requests: (verb, bucket/key) in the order of arrival. mode is what goes wrong:
    hang (accepts and never answers), 503, garbage (no XML), truncate (half of what came is stored)."""
    daemon_threads, SECRET = True, 'a-good-secret'

    def __init__(self, *buckets):
        super().__init__(('127.0.0.1', 0), Handler)
        self.buckets, self.objects, self.parts, self.requests, self.mode = buckets, {}, {}, [], ''
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.env = {'AWS_ENDPOINT_URL': f'http://127.0.0.1:{self.server_port}', 'AWS_ACCESS_KEY_ID': 'writer',
                    'AWS_SECRET_ACCESS_KEY': self.SECRET, 'AWS_DEFAULT_REGION': 'us-east-1', 'AWS_EC2_METADATA_DISABLED': 'true'}
        self.reader = self.env | {'AWS_ACCESS_KEY_ID': 'reader'}  # the Credential of a request says who it is

    def names(self, prefix=''):
        return sorted(key.removeprefix(prefix) for key in self.objects if key.startswith(prefix))


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def answer(self, code, body=b'', length=None, **headers):
        self.send_response(code)
        for name, value in {'Content-Length': len(body) if length is None else length, **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def xml(self, root, text):
        self.answer(200, f'<?xml version="1.0"?><{root}>{text}</{root}>'.encode(), Content_Type='application/xml')

    def error(self, code, name):
        """It repeats a secret, as servers do that say what they were sent."""
        text = f'<?xml version="1.0"?><Error><Code>{name}</Code><Message>{FakeS3.SECRET}</Message></Error>'
        self.answer(code, b'' if self.command == 'HEAD' else text.encode())

    def read_body(self):
        size = int(self.headers.get('Content-Length') or 0)
        data = self.rfile.read(size)
        if 'aws-chunked' not in self.headers.get('Content-Encoding', ''):
            return data
        body = b''
        while True:  # size;signature CRLF bytes CRLF, the last one of size 0
            head, _, data = data.partition(b'\r\n')
            size = int(head.split(b';')[0], 16)
            if not size:
                return body
            body, data = body + data[:size], data[size + 2:]

    def handle_request(self):
        server, url = self.server, urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        name = urllib.parse.unquote(url.path).strip('/')
        bucket, _, key = name.partition('/')
        body = self.read_body()
        server.requests.append((self.command, name))
        if server.mode == 'hang':
            time.sleep(3600)
        if server.mode == '503':
            return self.error(503, 'SlowDown')
        if server.mode == 'garbage':
            return self.answer(200, b'\0<html>')
        who = self.headers.get('Authorization', '').partition('Credential=')[2].partition('/')[0]
        if who not in ('writer', 'reader') or who == 'reader' and self.command in ('PUT', 'POST', 'DELETE'):
            return self.error(403, 'AccessDenied')
        if bucket not in server.buckets:
            return self.error(404, 'NoSuchBucket')
        getattr(self, self.command.lower())(name, key, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def get(self, name, key, query, body):
        objects = self.server.objects
        if not key:
            found = [n.partition('/')[2] for n in self.server.names() if n.startswith(f'{name}/{query.get("prefix", "")}')]
            return self.xml('ListBucketResult', '<IsTruncated>false</IsTruncated>' + ''.join(
                f'<Contents><Key>{escape(k)}</Key></Contents>' for k in found))
        if name not in objects:
            return self.error(404, 'NoSuchKey')
        data, headers = objects[name], {'ETag': f'"{hashlib.md5(objects[name]).hexdigest()}"'}
        if span := self.headers.get('Range'):
            first, last = (int(n or len(data)) for n in span.removeprefix('bytes=').split('-'))
            headers['Content-Range'] = f'bytes {first}-{min(last, len(data) - 1)}/{len(data)}'
            data = data[first:last + 1]
        self.answer(206 if span else 200, data, **headers)

    head = get

    def put(self, name, key, query, body):
        if self.server.mode == 'truncate' and name.endswith('.pt'):
            body = body[:len(body) // 2]
        if 'uploadId' in query:
            self.server.parts[name, int(query['partNumber'])] = body
        elif self.headers.get('If-None-Match') == '*' and name in self.server.objects:
            return self.error(412, 'PreconditionFailed')
        else:
            self.server.objects[name] = body
        self.answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def post(self, name, key, query, body):
        if 'uploads' in query:
            return self.xml('InitiateMultipartUploadResult', '<UploadId>1</UploadId>')
        parts = sorted(part for part in self.server.parts if part[0] == name)
        self.server.objects[name] = b''.join(self.server.parts.pop(part) for part in parts)
        self.xml('CompleteMultipartUploadResult', '<ETag>"x-1"</ETag>')

    def delete(self, name, key, query, body):
        self.server.objects.pop(name, None)
        self.answer(204)
