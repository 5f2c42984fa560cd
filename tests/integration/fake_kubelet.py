"""A kubelet, as far as a device plugin sees it: a real gRPC registration server on kubelet.sock,
and what it does with the plugin that registers. Follows the real one's order: Register, dial the
plugin's socket, ListAndWatch for as long as it stands; at its start it empties its directory."""

import os
import threading
from concurrent import futures

import grpc

from daemon import bound
from wire import kubelet as api
from worker import channel_to

CALL_SECONDS = bound(30)


class Kubelet(api.RegistrationServicer):
    """`registrations` are the requests it took; `devices` is {id: health} as last told, None before
    the first list and after the stream has ended. `refuse` is a (code, message) for Register."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.socket = os.path.join(self.folder, "kubelet.sock")
        self.changed = threading.Condition()
        self.registrations, self.devices, self.lists = [], None, 0
        self.refuse, self.watches = None, True
        self.server = self.channel = self.plugin = None

    def start(self):
        for name in os.listdir(self.folder):  # as the real one: what is no folder goes
            path = os.path.join(self.folder, name)
            if not os.path.isdir(path):
                os.unlink(path)
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        api.add_RegistrationServicer_to_server(self, self.server)
        assert self.server.add_insecure_port(f"unix:{self.socket}")
        self.server.start()
        return self

    def stop(self):
        """Ends as a process does that is told to: connections close, the socket goes."""
        self.hang_up()
        self.server.stop(None).wait()
        self.server = None

    def hang_up(self):
        """Closes the connection to the plugin."""
        if self.channel is not None:
            self.channel.close()
        with self.changed:
            self.channel = self.plugin = self.devices = None

    def Register(self, request, context):
        if self.refuse:
            context.abort(*self.refuse)
        channel = channel_to(f"unix:{os.path.join(self.folder, request.endpoint)}")
        plugin = api.DevicePluginStub(channel)
        if self.watches:
            threading.Thread(target=self._watch, args=(plugin,), daemon=True).start()
        with self.changed:
            if self.channel is not None:
                self.channel.close()
            self.channel, self.plugin = channel, plugin
            self.registrations.append(request)
            self.changed.notify_all()
        return api.Empty()

    def _watch(self, plugin):
        try:
            for reply in plugin.ListAndWatch(api.Empty()):
                with self.changed:
                    self.devices = {device.ID: device.health for device in reply.devices}
                    self.lists += 1
                    self.changed.notify_all()
        except (grpc.RpcError, ValueError):  # the plugin has gone, or our channel is closed
            pass
        with self.changed:
            if plugin is self.plugin:
                self.devices = None
            self.changed.notify_all()

    def wait_for(self, condition, seconds=20):
        with self.changed:
            assert self.changed.wait_for(condition, bound(seconds)), (
                f"{len(self.registrations)} registrations, devices {self.devices}")

    def wait_registered(self, times=1, healthy=True):
        """Until it was told `times` times of a plugin, whose devices are healthy."""
        wanted = {"Healthy"} if healthy else {"Unhealthy"}
        self.wait_for(lambda: len(self.registrations) >= times and self.devices is not None
                      and set(self.devices.values()) == wanted)

    def allocate(self, *containers):
        """One Allocate; each container is a list of device ids. The containers' responses."""
        request = api.AllocateRequest(container_requests=[
            api.ContainerAllocateRequest(devices_ids=ids) for ids in containers])
        return list(self.plugin.Allocate(request, timeout=CALL_SECONDS).container_responses)

    def prefer(self, available, count, must_include=()):
        request = api.PreferredAllocationRequest(container_requests=[
            api.ContainerPreferredAllocationRequest(
                available_deviceIDs=available, must_include_deviceIDs=must_include,
                allocation_size=count)])
        reply = self.plugin.GetPreferredAllocation(request, timeout=CALL_SECONDS)
        return list(reply.container_responses[0].deviceIDs)


class Container:
    """What a runtime makes of a response: where its worker finds the daemon. (The mount itself is
    played by the path on this side of it.)"""

    def __init__(self, response):
        mount, = response.mounts
        assert mount.container_path == "/run/clusterkv" and mount.read_only
        self.folder = mount.host_path
        variable = response.envs["CLUSTERKV_ADDRESS"]
        assert variable.startswith(f"unix:{mount.container_path}/"), variable
        self.address = variable.replace(mount.container_path, self.folder)
        self.grant = response.annotations["clusterkv.io/grant"]
