/* Bind before connect in C: cc connect.c && ./a.out /run/bridge/agent.sock 192.168.31.67 443 */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: %s SOCKET ADDRESS PORT\n", argv[0]), 2;
    struct sockaddr_un agent = {.sun_family = AF_UNIX};
    snprintf(agent.sun_path, sizeof agent.sun_path, "%s", argv[1]);
    char body[128], text[4096] = "";
    int lease = socket(AF_UNIX, SOCK_STREAM, 0); /* the lease lasts as long as this is open */
    if (connect(lease, (struct sockaddr *)&agent, sizeof agent)) return perror(argv[1]), 1;
    snprintf(body, sizeof body, "{\"destination\":\"%s:%s\"}", argv[2], argv[3]);
    dprintf(lease, "POST /v1/leases HTTP/1.1\r\nHost: bridge\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
    for (size_t n = 0; n < sizeof text - 1 && !strchr(text, '}');) { /* the JSON is small, and ends in a brace */
        ssize_t got = read(lease, text + n, sizeof text - 1 - n);
        if (got <= 0) break;
        text[n += got] = 0;
    }
    char *port = strstr(text, "\"port\":");
    if (!port) return fprintf(stderr, "no port: %s\n", text), 1;

    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in from = {.sin_family = AF_INET, .sin_port = htons(atoi(port + 7))};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[3]))};
    inet_pton(AF_INET, argv[2], &to.sin_addr);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&from, sizeof from)) return perror("bind"), 1;
    if (connect(fd, (struct sockaddr *)&to, sizeof to)) return perror("connect"), 1;
    printf("%d\n", ntohs(from.sin_port));
    return 0;
}
