/* Bind before connect in C and C++: a source port from the pool of bridge-agent. Header only; Linux.
 *
 *   int lease, fd = bridge_connect("/run/bridge/agent.sock", address, length, &lease);
 *   if (fd < 0) perror("connect");
 *   ...
 *   close(fd);
 *   close(lease);
 *
 * The port belongs to the connection while `lease` is open; the kernel closes both when the program ends in any way. */
#ifndef BRIDGE_CLIENT_H
#define BRIDGE_CLIENT_H

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Ports that are tried when another socket of this network namespace has bound them. */
#define BRIDGE_BIND_TRIES 8

/* Closes `fd`, keeps errno, and returns -1. */
static inline int bridge_failed(int fd) {
    int error = errno;
    if (fd >= 0) close(fd);
    errno = error;
    return -1;
}

/* Returns the length of the body that the head of an answer announces; `end` is the end of the head. */
static inline size_t bridge_length(const char *head, const char *end) {
    static const char name[] = "\r\ncontent-length:";
    for (; head < end; head++)
        if (!strncasecmp(head, name, sizeof name - 1)) return strtoul(head + sizeof name - 1, NULL, 10);
    return 0;
}

/* Sends the request and reads the answer into `text`. Returns 0, or -1 with errno. */
static inline int bridge_ask(int fd, const char *request, char *text, size_t size) {
    size_t length = strlen(request), sent = 0, read_so_far = 0;
    while (sent < length) {
        ssize_t n = send(fd, request + sent, length - sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -1;
        sent += (size_t)n;
    }
    for (;;) {
        char *body;
        ssize_t n = recv(fd, text + read_so_far, size - 1 - read_so_far, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -1;
        read_so_far += (size_t)n;
        text[read_so_far] = 0;
        body = strstr(text, "\r\n\r\n");
        if (body && strlen(body + 4) >= bridge_length(text, body)) return 0;
        if (n == 0 || read_so_far == size - 1) return errno = EPROTO, -1;
    }
}

/* Leases a port for a TCP connection to `to`. Returns a descriptor that holds the lease, or -1 with errno:
 * EADDRNOTAVAIL if no port is free, EACCES if the agent refuses, EPROTO if the answer is not understood. */
static inline int bridge_lease(const char *agent, const struct sockaddr *to, unsigned short *port) {
    struct sockaddr_un path;
    char address[INET6_ADDRSTRLEN], destination[INET6_ADDRSTRLEN + 16], body[160], request[320], text[4096], *found;
    int fd, status;
    if (to->sa_family == AF_INET) {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)to;
        inet_ntop(AF_INET, &v4->sin_addr, address, sizeof address);
        snprintf(destination, sizeof destination, "%s:%u", address, ntohs(v4->sin_port));
    } else if (to->sa_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)to;
        inet_ntop(AF_INET6, &v6->sin6_addr, address, sizeof address);
        snprintf(destination, sizeof destination, "[%s]:%u", address, ntohs(v6->sin6_port));
    } else {
        return errno = EAFNOSUPPORT, -1;
    }
    memset(&path, 0, sizeof path);
    path.sun_family = AF_UNIX;
    if (strlen(agent) >= sizeof path.sun_path) return errno = ENAMETOOLONG, -1;
    strcpy(path.sun_path, agent);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&path, sizeof path)) return bridge_failed(fd);
    snprintf(body, sizeof body, "{\"destination\":\"%s\"}", destination);
    snprintf(request, sizeof request, "POST /v1/leases HTTP/1.1\r\nHost: bridge\r\nContent-Length: %zu\r\n\r\n%s",
             strlen(body), body);
    if (bridge_ask(fd, request, text, sizeof text)) return bridge_failed(fd);
    status = strlen(text) > 12 ? atoi(text + 9) : 0;
    found = strstr(text, "\"port\":");
    if (status / 100 != 2 || !found) {
        errno = status == 403 ? EACCES : status / 100 == 4 || status == 503 ? EADDRNOTAVAIL : EPROTO;
        return bridge_failed(fd);
    }
    *port = (unsigned short)atoi(found + 7);
    return fd;
}

/* Connects to `to` by TCP from a leased port. Returns the connected socket, and in `lease` the descriptor that holds the
 * lease, to be closed after it; or -1 with errno, and then there is nothing to close. */
static inline int bridge_connect(const char *agent, const struct sockaddr *to, socklen_t length, int *lease) {
    int unusable[BRIDGE_BIND_TRIES], count = 0, fd = -1, error, one = 1;
    do {
        struct sockaddr_storage from;
        unsigned short port = 0;
        if ((*lease = bridge_lease(agent, to, &port)) < 0) {
            error = errno;
            break;
        }
        memset(&from, 0, sizeof from);
        from.ss_family = to->sa_family;
        /* The port is at the same place in both families. */
        ((struct sockaddr_in *)&from)->sin_port = htons(port);
        fd = socket(to->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && !setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) &&
            !bind(fd, (struct sockaddr *)&from, length) && !connect(fd, to, length)) {
            error = 0;
            break;
        }
        error = errno;
        bridge_failed(fd);
        fd = -1;
        /* Held until another port is found: the agent would give the same one again. */
        unusable[count++] = *lease;
        *lease = -1;
    } while ((error == EADDRINUSE || error == EADDRNOTAVAIL) && count < BRIDGE_BIND_TRIES);
    while (count) close(unusable[--count]);
    errno = error;
    return fd;
}

#endif
