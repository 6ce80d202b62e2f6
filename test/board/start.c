/* start.c - from reset to main, and the two things the board does for it: print and stop. Both go
 * to the emulator (or a debug probe) by semihosting: a breakpoint with a number and an argument in
 * registers. */
#include <stddef.h>
#include <stdint.h>

extern unsigned char data_in_flash[], data[], data_end[], bss[], bss_end[];
int main(void);

__asm__(".section .model, \"a\"\n"
        ".global model, model_end\n"
        ".balign 64\n"
        "model: .incbin \"" MODEL_FILE "\"\n"
        "model_end:\n"
        ".text\n");

enum { WRITE0 = 0x04, EXIT_EXTENDED = 0x20 };

static void host(uintptr_t number, const void *argument)
{
#if defined(__arm__)
    register uintptr_t a __asm__("r0") = number;
    register const void *b __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(a) : "r"(b) : "memory");
#else
    register uintptr_t a __asm__("a0") = number;
    register const void *b __asm__("a1") = argument;
    __asm__ volatile(".option push\n.option norvc\n.balign 16\n" /* all three must be in one page */
                     "slli x0, x0, 0x1f\nebreak\nsrai x0, x0, 7\n.option pop"
                     : "+r"(a)
                     : "r"(b)
                     : "memory");
#endif
}

void print(const char *text) { host(WRITE0, text); }

void stop(int code)
{
    const uintptr_t why[2] = {0x20026, (uintptr_t)code}; /* the program ended, with this code */
    host(EXIT_EXTENDED, why);
    for (;;) {}
}

void start(void)
{
#if defined(__arm__)
    *(volatile uint32_t *)0xe000ed88 |= 0xf << 20; /* CPACR: the FPU is off after reset */
    __asm__ volatile("dsb\n\tisb");
#endif
    for (size_t i = 0; data + i < data_end; i++) data[i] = data_in_flash[i];
    for (unsigned char *p = bss; p < bss_end; p++) *p = 0;
    stop(main());
}

#if defined(__arm__)
/* A Cortex-M takes its stack and its first instruction from the first two words. */
__asm__(".section .vectors, \"a\"\n.word stack_top, start\n.text\n");
#else
__asm__(".section .vectors, \"ax\"\n"
        ".global _start\n"
        "_start:\n"
        ".option push\n.option norelax\nla gp, __global_pointer$\n.option pop\n"
        "la sp, stack_top\n"
#if defined(__riscv_flen)
        "li t0, 0x6000\ncsrs mstatus, t0\n" /* FS: the FPU is off after reset */
#endif
        "j start\n"
        ".text\n");
#endif
