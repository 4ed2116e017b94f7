/* Bind before connect in C: cc connect.c && ./a.out /run/bridge/agent.sock 192.168.31.67 443 */
#include "bridge_client.h"

#include <netdb.h>

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: %s SOCKET ADDRESS PORT\n", argv[0]), 2;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *to;
    int failed = getaddrinfo(argv[2], argv[3], &hints, &to);
    if (failed) return fprintf(stderr, "%s: %s\n", argv[2], gai_strerror(failed)), 1;
    int lease, fd = bridge_connect(argv[1], to->ai_addr, to->ai_addrlen, &lease);
    freeaddrinfo(to);
    if (fd < 0) return perror("connect"), 1;

    struct sockaddr_in6 from; /* has the port where sockaddr_in has it */
    socklen_t length = sizeof from;
    if (getsockname(fd, (struct sockaddr *)&from, &length)) return perror("getsockname"), 1;
    printf("%d\n", ntohs(from.sin6_port));
    close(fd);
    close(lease);
    return 0;
}
